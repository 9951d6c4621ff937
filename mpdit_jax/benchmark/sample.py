"""`python -m mpdit_jax.benchmark sample`: compare the sampler with a loop that calls the model."""

import itertools
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from mpdit_jax.benchmark.common import check_at_least, make_benchmark_parser, print_report, take_turns, timed
from mpdit_jax.errors import InputError

_EXAMPLES = """\
  python -m mpdit_jax.benchmark sample --preset=mpdit_b --batch=4 --steps=10 --guidance_scale=1.5
  python -m mpdit_jax.benchmark sample --precision=bfloat16 --format=json
"""


def main(arguments: Sequence[str]) -> int:
    """Measure as the arguments say, print, and return the exit status."""
    parser = make_benchmark_parser(
        "sample",
        "Time the sampler on a model with random weights, beside a loop that calls the jitted float32 model once a "
        "step for the class and, when guiding, once more for the null class. Both are compiled first and then take "
        "turns; the figures are medians.",
        _EXAMPLES,
        repeats=3,
    )
    parser.add_argument("--preset", default="mpdit_b", help="model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="velocity evaluations (default: %(default)s)")
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="1.0 for none (default: %(default)s)")
    parser.add_argument("--precision", default="float32", help="of the sampler: float32 | bfloat16 (default: float32)")
    parser.add_argument("--solver", default="euler", help="of fixed steps (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_at_least(options, 1, ("batch", "repeats"))
    return print_report(options, measure(options), _as_text)


def measure(options: Namespace) -> dict[str, Any]:
    """Run the benchmark and return the report as plain numbers and strings.

    Raises:
        ConfigError: an unknown preset.
        InputError: sampler settings that do not fit together, or an adaptive solver.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mpdit_jax.flow.adaptive import Adaptive
    from mpdit_jax.flow.randomness import draw_noise
    from mpdit_jax.flow.sampler import make_sampler
    from mpdit_jax.model.parameters import abstract, merge
    from mpdit_jax.model.presets import preset_config

    sampler = make_sampler(options.solver, options.steps, options.guidance_scale, precision=options.precision)
    if isinstance(sampler.settings.solver, Adaptive):
        raise InputError(f"--solver={options.solver}: it takes as many steps as it needs; choose one of fixed steps.")
    structure, shapes = abstract(preset_config(options.preset))
    # Random weights: a fresh model's last layer is zero, and its outputs could not be compared.
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
    times = np.linspace(1, 0, options.steps + 1, dtype=np.float32)

    def loop() -> jax.Array:
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

    expected, found = np.asarray(loop()), np.asarray(sample())  # compiles both
    seconds = take_turns(options.repeats, {"sampler": lambda: timed(sample), "loop": lambda: timed(loop)})
    report = {
        **{name: vars(options)[name] for name in ("preset", "batch", "steps", "guidance_scale", "precision")},
        "device": jax.devices()[0].device_kind,
        "seconds": seconds["sampler"],
        "images_per_second": options.batch / seconds["sampler"],
        "naive_seconds": seconds["loop"],
        "speedup": seconds["loop"] / seconds["sampler"],
    }
    if options.solver == "euler":  # the loop's
        report["relative_difference"] = float(np.abs(found - expected).max() / np.abs(expected).max())
    return report


def _as_text(report: Mapping[str, Any]) -> str:
    difference = ""
    if "relative_difference" in report:
        difference = (
            f"  (largest difference of the latents: {report['relative_difference']:.1e} of their largest value)"
        )
    return (
        f"{report['preset']}, batch {report['batch']}, {report['steps']} steps, guidance "
        f"{report['guidance_scale']:g}, {report['precision']}, on {report['device']}:\n"
        f"  sampler          {report['seconds']:8.3f} s   {report['images_per_second']:.3g} images/s\n"
        f"  float32 model in a loop {report['naive_seconds']:.3f} s\n"
        f"  speedup          {report['speedup']:8.2f} x{difference}"
    )
