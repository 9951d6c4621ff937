"""From compiled programs to what a person wants to know before renting a pod."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.chips import GIB, Chip
from mpdit_jax.compiling.collectives import ring_bytes
from mpdit_jax.compiling.programs import Program
from mpdit_jax.config import model_of
from mpdit_jax.model.accounting import count_macs, training_flops

_RECOMPUTED = {"none": 0.0, "dots": 0.0, "full": 1.0}  # forward passes done again in the backward pass


def step_flops(config: FrozenConfigDict) -> float:
    """Floating-point operations of a step over all chips: a forward pass and twice as many backward, 2 a multiply-add.

    What remat computes again is included.
    """
    model = model_of(config)
    return config.batch_size * training_flops(model, config.mask_ratio) * (1 + _RECOMPUTED[model.remat] / 3)


def sampler_flops(config: FrozenConfigDict, batch_size: int) -> float:
    """Floating-point operations of a guided sampling run over all chips."""
    return (
        2.0
        * count_macs(model_of(config))
        * batch_size
        * config.sample.steps
        * (1 + (config.sample.guidance_scale != 1))
    )


def describe(program: Program, flops: float, chips: int, chip: Chip | None) -> dict[str, Any]:
    """One program's figures, per chip.

    Args:
        program: what was compiled.
        flops: over all chips.
        chips: their number.
        chip: their kind, if its peaks are known.
    """
    report: dict[str, Any] = {**dataclasses.asdict(program), "flops": flops / chips}
    if chip is not None:
        report["hbm"] = chip.hbm
        report["fits"] = program.peak <= chip.hbm
        bounds = {
            "matrix products": flops / chips / chip.flops,
            "memory": program.arguments / chip.hbm_bandwidth,
            "links": ring_bytes(program.collectives) / chip.ici_bandwidth,
        }
        report["bound_seconds"] = max(bounds.values())
        report["bound_by"] = max(bounds, key=lambda name: bounds[name])
    return report


def smaller(config: FrozenConfigDict, chips: int) -> Iterator[tuple[str, FrozenConfigDict]]:
    """Settings that need less memory, the least recomputation first: as flags, and as configs."""
    later = ("none", "dots", "full")
    for remat in later[later.index(config.model.remat) + 1 :]:
        yield f"--config.model.remat={remat}", _with(config, remat, config.gradient_accumulation)
    parts = config.gradient_accumulation * 2
    while config.batch_size % parts == 0 and (config.batch_size // parts) % chips == 0:
        yield (
            f"--config.model.remat=full --config.gradient_accumulation={parts}",
            _with(config, "full", parts),
        )
        parts *= 2


def _with(config: FrozenConfigDict, remat: str, parts: int) -> FrozenConfigDict:
    changed = ConfigDict(config)
    changed.model.remat, changed.gradient_accumulation = remat, parts
    return FrozenConfigDict(changed)


def as_text(name: str, report: dict[str, Any]) -> str:
    """A block of lines for one program."""
    lines = [
        f"{name}, per chip",
        f"  arguments    {report['arguments'] / GIB:8.2f} GiB",
        f"  temporaries  {report['temporaries'] / GIB:8.2f} GiB",
        f"  peak         {report['peak'] / GIB:8.2f} GiB",
    ]
    if "hbm" in report:
        verdict = "fits" if report["fits"] else "does NOT fit"
        lines[-1] += f"  {verdict} {report['hbm'] / GIB:.2f} GiB"
    lines.append(f"  analytic     {report['flops'] / 1e12:8.3f} TFLOP")
    moved = {kind: size for kind, size in report["collectives"].items() if size}
    listed = ", ".join(f"{kind} {size / GIB:.3f} GiB" for kind, size in moved.items()) or "none"
    lines.append(f"  collectives  {listed}")
    if "bound_seconds" in report:
        lines.append(
            f"  bound        {1e3 * report['bound_seconds']:8.2f} ms by {report['bound_by']}: no less time at "
            "published peaks; a bound, not a measurement"
        )
    lines.append(f"  compiled in  {report['seconds_to_compile']:8.1f} s")
    return "\n".join(lines)
