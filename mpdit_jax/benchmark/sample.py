"""`python -m mpdit_jax.benchmark sample`: the sampler against calling the model in a loop."""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence

from mpdit_jax.errors import InputError
from mpdit_jax.runtime.cli import Parser, make_parser

_EXAMPLES = """\
  python -m mpdit_jax.benchmark sample --preset=mpdit_b --batch=4 --steps=10 --guidance_scale=1.5
  python -m mpdit_jax.benchmark sample --precision=bfloat16 --format=json
"""


def make_benchmark_parser() -> Parser:
    """The benchmark's arguments."""
    parser = make_parser(
        "benchmark sample",
        "Time the sampler on a model with random weights, against a loop that calls the jitted float32 "
        "model once a step for the class and, when guiding, once more for the null class. Both are compiled first and "
        "then timed in turn; the figures are medians.",
        _EXAMPLES,
    )
    parser.add_argument("--preset", default="mpdit_b", help="model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="velocity evaluations (default: %(default)s)")
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="1.0 for none (default: %(default)s)")
    parser.add_argument("--precision", default="float32", help="of the sampler: float32 | bfloat16 (default: float32)")
    parser.add_argument("--solver", default="euler", help="of fixed steps (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="times each is timed (default: %(default)s)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="json: one object on one line")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Time it, print it; exit status."""
    options = make_benchmark_parser().parse_args(arguments)
    if min(options.batch, options.repeats) < 1:
        raise InputError(f"--batch={options.batch}, --repeats={options.repeats}: expected 1 or more of each.")

    import jax
    import jax.numpy as jnp
    import numpy as np

    from mpdit_jax.flow.adaptive import Adaptive
    from mpdit_jax.flow.randomness import draw_noise
    from mpdit_jax.flow.sampler import make_sampler
    from mpdit_jax.model.parameters import abstract, merge, split
    from mpdit_jax.model.presets import preset_config

    sampler = make_sampler(options.solver, options.steps, options.guidance_scale, precision=options.precision)
    if isinstance(sampler.settings.solver, Adaptive):
        raise InputError(f"--solver={options.solver}: it takes as many steps as it needs; choose one of fixed steps.")
    structure, shapes = abstract(preset_config(options.preset))
    # Random weights, for a fresh model's last layer is zero and its outputs could not be compared.
    random = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(0.02 * random.standard_normal(leaf.shape, np.float32)) for name, leaf in shapes.items()
    }
    model = merge(structure, parameters)
    labels = jnp.arange(options.batch) % model.num_classes
    null = jnp.full_like(labels, model.num_classes)
    key = jax.random.key(0)
    noise = draw_noise(key, jnp.arange(options.batch), model.input_shape)
    call = jax.jit(lambda parameters, z, t, y: merge(structure, parameters)(z, t, y))
    parameters = split(model)[1]
    times = np.linspace(1, 0, options.steps + 1, dtype=np.float32)

    def naive() -> jax.Array:
        z = noise
        for t, t_next in itertools.pairwise(times):
            batch_times = jnp.full(options.batch, t)
            velocity = call(parameters, z, batch_times, labels)
            if options.guidance_scale != 1:
                v_null = call(parameters, z, batch_times, null)
                velocity = v_null + options.guidance_scale * (velocity - v_null)
            z = z + (t_next - t) * velocity
        return z.block_until_ready()

    def sample() -> jax.Array:
        return sampler(model, labels, key, noise).block_until_ready()

    expected, found = np.asarray(naive()), np.asarray(sample())  # compiles both
    seconds, naive_seconds = _medians(options.repeats, sample, naive)
    result = {
        "preset": options.preset,
        "batch": options.batch,
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "precision": options.precision,
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "images_per_second": options.batch / seconds,
        "naive_seconds": naive_seconds,
        "speedup": naive_seconds / seconds,
    }
    if options.solver == "euler":  # the loop's
        result["relative_difference"] = float(np.abs(found - expected).max() / np.abs(expected).max())
    if options.format == "json":
        print(json.dumps(result))
    else:
        same = "  (largest difference of the latents: {:.1e} of their largest value)"
        difference = same.format(result["relative_difference"]) if "relative_difference" in result else ""
        print(
            f"{options.preset}, batch {options.batch}, {options.steps} steps, guidance {options.guidance_scale:g}, "
            f"{options.precision}, on {result['device']}:\n"
            f"  sampler          {seconds:8.3f} s   {result['images_per_second']:.3g} images/s\n"
            f"  float32 model in a loop {naive_seconds:.3f} s\n"
            f"  speedup          {result['speedup']:8.2f} x{difference}"
        )
    return 0


def _medians(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function, timed in turn so that a busy moment of the machine meets all of them."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for measured, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            function()
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in seconds]
