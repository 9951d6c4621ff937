"""`python -m mpdit_jax.benchmark train`: measure the train step as a share of a matrix product's speed."""

import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from mpdit_jax.benchmark.common import check_at_least, make_benchmark_parser, print_report, take_turns, timed

_EXAMPLES = """\
  python -m mpdit_jax.benchmark train --preset=mpdit_b --batch=8
  python -m mpdit_jax.benchmark train --preset=mpdit_xl --batch=64 --dtype=bfloat16 --format=json
"""


def main(arguments: Sequence[str]) -> int:
    """Measure as the arguments say, print, and return the exit status."""
    parser = make_benchmark_parser(
        "train",
        "Time the forward pass and the whole train step (loss, gradients, AdamW, EMA) of a preset, and a large matrix "
        "product of the same dtype, in turn. Shares are true multiply-adds a second over the product's: a step counts "
        "three forward passes, whatever remat computes again.",
        _EXAMPLES,
        repeats=5,
    )
    parser.add_argument("--preset", default="mpdit_b", help="model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="examples a step (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="(default: %(default)s)")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    check_at_least(options, 1, ("batch", "repeats"))
    return print_report(options, measure(options), _as_text)


def measure(options: Namespace) -> dict[str, Any]:
    """Run the benchmark on one device and return the report as plain numbers and strings.

    Raises:
        ConfigError: an unknown preset, or an attention that the device does not have.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mpdit_jax.config.base import base_config, model_config, resolve
    from mpdit_jax.distributed.mesh import make_mesh
    from mpdit_jax.errors import ConfigError
    from mpdit_jax.model.accounting import count_macs
    from mpdit_jax.model.parameters import abstract, merge
    from mpdit_jax.runtime.hardware import matrix_product, published_flops
    from mpdit_jax.train.optimizer import make_optimizer
    from mpdit_jax.train.state import abstract_state, create_state
    from mpdit_jax.train.step import build_train_step, jit_step

    config = base_config()
    config.batch_size = batch = options.batch
    config.model.update({name: vars(options)[name] for name in ("preset", "dtype", "attention", "remat")})
    config = resolve(config)
    device = jax.devices()[0]
    if options.attention == "cudnn" and device.platform != "gpu":
        raise ConfigError(f"--attention=cudnn needs an NVIDIA GPU and this is {device.platform}: use xla.")
    model, optimizer, mesh = model_config(config), make_optimizer(config.optimizer), make_mesh(devices=[device])
    structure, random = abstract(model)[0], np.random.default_rng(0)
    with jax.set_mesh(mesh):
        state = create_state(model, optimizer, abstract_state(model, optimizer, mesh), seed=0)
        update = jit_step(build_train_step(config, structure, optimizer), state, mesh)
        x = jnp.asarray(random.standard_normal((batch, *model.input_size, model.in_channels), np.float32))
        y = jnp.asarray(random.integers(model.num_classes, size=batch), jnp.int32)
        t = jnp.asarray(random.uniform(size=batch), jnp.float32)
        call = jax.jit(lambda parameters, x, t, y: merge(structure, parameters)(x, t, y))
        multiply, operations = matrix_product(device, options.dtype)

        def forward() -> None:
            call(state.parameters, x, t, y).block_until_ready()

        def step() -> None:
            nonlocal state
            state = update(state, {"x": x, "y": y})
            jax.block_until_ready(state)

        tasks = {
            "forward": lambda: timed(forward),
            "step": lambda: timed(step),
            # A product takes a fraction of a second, so that one measurement would be noisy.
            "product": lambda: statistics.median(timed(multiply) for _ in range(6)),
        }
        take_turns(1, tasks)  # compiles
        seconds = take_turns(options.repeats, tasks)
    macs = count_macs(model) * batch
    peak_rate, published = operations / 2 / seconds["product"], published_flops(device.device_kind)
    return {
        **{name: vars(options)[name] for name in ("preset", "batch", "dtype", "attention", "remat")},
        "device": device.device_kind,
        "seconds_forward": seconds["forward"],
        "seconds_step": seconds["step"],
        "images_per_second": batch / seconds["step"],
        "peak_macs_per_second": peak_rate,
        "forward_macs_per_second": macs / seconds["forward"],
        "step_macs_per_second": 3 * macs / seconds["step"],
        "forward_share": macs / seconds["forward"] / peak_rate,
        "step_share": 3 * macs / seconds["step"] / peak_rate,
        "mfu": None if published is None else 2 * 3 * macs / seconds["step"] / published,
    }


def _as_text(report: Mapping[str, Any]) -> str:
    lines = [
        f"{report['preset']}, batch {report['batch']}, {report['dtype']}, attention {report['attention']}, remat "
        f"{report['remat']}, on {report['device']}:",
        f"  matrix product   {report['peak_macs_per_second'] / 1e9:10.1f} GMAC/s",
        f"  forward pass     {report['forward_macs_per_second'] / 1e9:10.1f} GMAC/s   "
        f"{report['forward_share']:6.1%} of that, {report['seconds_forward']:.3f} s",
        f"  training step    {report['step_macs_per_second'] / 1e9:10.1f} GMAC/s   "
        f"{report['step_share']:6.1%} of that, {report['seconds_step']:.3f} s, "
        f"{report['images_per_second']:.3g} images/s",
    ]
    if report["mfu"] is not None:
        lines.append(f"  MFU              {report['mfu']:20.1%} of the published bfloat16 peak")
    return "\n".join(lines)
