"""`python -m mpdit_jax.benchmark train`: the training step as a share of the machine's own matrix products."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from mpdit_jax.errors import InputError
from mpdit_jax.runtime.cli import Parser, make_parser

_EXAMPLES = """\
  python -m mpdit_jax.benchmark train --preset=mpdit_b --batch=8
  python -m mpdit_jax.benchmark train --preset=mpdit_xl --batch=64 --dtype=bfloat16 --format=json
"""
_PRODUCTS = 3  # after each timed pass
_Task: TypeAlias = Callable[[], None]


def make_train_parser() -> Parser:
    """The benchmark's arguments."""
    parser = make_parser(
        "benchmark train",
        "Time the forward pass and the whole training step (loss, gradients, AdamW, EMA) of a preset, and a large "
        "matrix product of the same dtype, in turn. Shares are true multiply-adds a second over the product's: a step "
        "counts three forward passes, whatever remat computes again.",
        _EXAMPLES,
    )
    parser.add_argument("--preset", default="mpdit_b", help="model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="examples a step (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="(default: %(default)s)")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="times each is timed (default: %(default)s)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="json: one object on one line")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Time it, print it; exit status."""
    options = make_train_parser().parse_args(arguments)
    if min(options.batch, options.repeats) < 1:
        raise InputError(f"--batch={options.batch}, --repeats={options.repeats}: expected 1 or more of each.")
    result = measure(options.preset, options.batch, options.dtype, options.attention, options.remat, options.repeats)
    print(json.dumps(result) if options.format == "json" else _as_text(result))
    return 0


def measure(preset: str, batch: int, dtype: str, attention: str, remat: str, repeats: int) -> dict[str, Any]:
    """Run the benchmark on one device; the report as plain numbers and strings.

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
    config.batch_size, config.model.preset = batch, preset
    config.model.dtype, config.model.attention, config.model.remat = dtype, attention, remat
    config = resolve(config)
    device = jax.devices()[0]
    if attention == "cudnn" and device.platform != "gpu":
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
        peak, operations = matrix_product(device, dtype)

        def forward() -> None:
            call(state.parameters, x, t, y).block_until_ready()

        def step() -> None:
            nonlocal state
            state = update(state, {"x": x, "y": y})
            jax.block_until_ready(state)

        seconds, product = _time(repeats, forward, step, peak)
    macs = count_macs(model) * batch
    peak_rate, published = operations / 2 / product, published_flops(device.device_kind)
    return {
        "preset": preset,
        "batch": batch,
        "dtype": dtype,
        "attention": attention,
        "remat": remat,
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


def _time(repeats: int, forward: _Task, step: _Task, peak: _Task) -> tuple[dict[str, float], float]:
    """Median seconds of the forward pass and of the step, and of the product, all timed in turn.

    The first turn compiles and is left out. A product takes a fraction of a second, in which a busy moment of the
    machine weighs more, so there are several after each pass.
    """
    seconds: dict[str, list[float]] = {"forward": [], "step": []}
    products: list[float] = []
    for turn in range(repeats + 1):
        for name, task in (("forward", forward), ("step", step)):
            taken = _seconds(task)
            if turn:
                seconds[name].append(taken)
            products.extend(_seconds(peak) for _ in range(_PRODUCTS))
    return {name: statistics.median(values) for name, values in seconds.items()}, statistics.median(products)


def _seconds(task: _Task) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def _as_text(result: Mapping[str, Any]) -> str:
    return (
        f"{result['preset']}, batch {result['batch']}, {result['dtype']}, attention {result['attention']}, remat "
        f"{result['remat']}, on {result['device']}:\n"
        f"  matrix product   {result['peak_macs_per_second'] / 1e9:10.1f} GMAC/s\n"
        f"  forward pass     {result['forward_macs_per_second'] / 1e9:10.1f} GMAC/s   "
        f"{result['forward_share']:6.1%} of that, {result['seconds_forward']:.3f} s\n"
        f"  training step    {result['step_macs_per_second'] / 1e9:10.1f} GMAC/s   "
        f"{result['step_share']:6.1%} of that, {result['seconds_step']:.3f} s, "
        f"{result['images_per_second']:.3g} images/s"
        + (
            ""
            if result["mfu"] is None
            else f"\n  MFU              {result['mfu']:20.1%} of the published bfloat16 peak"
        )
    )
