"""From compiled programs to what a person wants to know before renting a pod."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.compile.programs import Program
from mpdit_jax.config.base import model_config
from mpdit_jax.model.accounting import count_macs, recomputed_macs, training_flops
from mpdit_jax.runtime.hardware import GIB, Chip

_IMAGES_IN_A_PART = 8  # on a chip, at the least, before `full` is tried: of 64 coarse tokens, 512 rows of a product


def step_flops(config: FrozenConfigDict) -> float:
    """Floating-point operations of a step over all chips: a forward pass and twice as many backward, 2 a multiply-add.

    What remat computes again is included.
    """
    model = model_config(config)
    recomputed = 2 * recomputed_macs(model, config.mask_ratio)
    return float(config.batch_size * (training_flops(model, config.mask_ratio) + recomputed))


def sampler_flops(config: FrozenConfigDict, batch_size: int) -> float:
    """Floating-point operations of a guided sampling run over all chips."""
    return (
        2.0
        * count_macs(model_config(config))
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
        report["fits"] = not program.refused and program.peak <= chip.hbm
        bounds = chip.bounds(flops / chips, program.arguments + program.results, program.sent or 0)
        report["bound_seconds"] = max(bounds.values())
        report["bound_by"] = max(bounds, key=lambda name: bounds[name])
    return report


def smaller(config: FrozenConfigDict, chips: int) -> Iterator[tuple[str, FrozenConfigDict]]:
    """Settings that need less memory, those that cost the least time first: as flags, and as configs.

    Each way of remat is tried with the state split as it is and over as many chips as the model's width divides over,
    then with the batch cut into parts. That computes nothing again, but gathers the parameters once a part, and
    products of few rows leave a chip idle: parts of fewer than eight images a chip are tried with `full` alone.
    """
    ways = ["none", "dots", "full"]
    ways = ways[ways.index(config.model.remat) :]
    now = chips // config.mesh.data if config.mesh.fsdp == -1 else config.mesh.fsdp
    most = math.gcd(chips, model_config(config).hidden_size)  # a width that does not divide is not split
    splits = [config.mesh.fsdp]
    if most > now:
        splits.append(most)
    # `dots` computes attention's products again, a hundredth of all: before parts. `full`, a third: after them.
    for least, alike in ((_IMAGES_IN_A_PART, [way for way in ways if way != "full"]), (1, ["full"])):
        for remat, fsdp in itertools.product(alike, splits):
            if (remat, fsdp) != (config.model.remat, config.mesh.fsdp):
                yield _changed(config, remat, fsdp, config.gradient_accumulation)
        for parts, remat in itertools.product(_parts(config, chips, least), alike):
            yield _changed(config, remat, splits[-1], parts)


def smaller_batches(batch_size: int, chips: int) -> Iterator[int]:
    """Batches to sample, half of the one before each time, down to an image a chip."""
    images = batch_size // chips
    while images > 1:
        images //= 2
        yield images * chips


def _parts(config: FrozenConfigDict, chips: int, least: int) -> Iterator[int]:
    """More parts of a batch than the config's, twice as many each time, while a chip has `least` images of a part."""
    parts = 2 * config.gradient_accumulation
    while config.batch_size % (parts * chips) == 0 and config.batch_size // (parts * chips) >= least:
        yield parts
        parts *= 2


def _changed(config: FrozenConfigDict, remat: str, fsdp: int, parts: int) -> tuple[str, FrozenConfigDict]:
    # By way of plain dicts: of a frozen config, all that are made by ConfigDict(config) share what is nested in it.
    changed, flags = ConfigDict(config.to_dict()), list[str]()
    if fsdp != config.mesh.fsdp:
        changed.mesh.data, changed.mesh.fsdp = -1, fsdp
        flags += ["--config.mesh.data=-1", f"--config.mesh.fsdp={fsdp}"]
    if remat != config.model.remat:
        changed.model.remat = remat
        flags.append(f"--config.model.remat={remat}")
    if parts != config.gradient_accumulation:
        changed.gradient_accumulation = parts
        flags.append(f"--config.gradient_accumulation={parts}")
    return " ".join(flags), FrozenConfigDict(changed)


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
    if report["refused"]:
        lines[2] += "  by the compiler's early estimate: it went no further"
    lines.append(f"  analytic     {report['flops'] / 1e12:8.3f} TFLOP")
    if report["compiled_flops"] is not None:
        lines.append(f"  compiled     {report['compiled_flops'] / 1e12:8.3f} TFLOP in matrix products")
    if report["collectives"] is not None:
        moved = {kind: size for kind, size in report["collectives"].items() if size}
        listed = ", ".join(f"{kind} {size / GIB:.3f} GiB" for kind, size in moved.items()) or "none"
        lines.append(f"  collectives  {listed}; sent {report['sent'] / GIB:.3f} GiB")
    if "bound_seconds" in report:
        lines.append(
            f"  bound        {1e3 * report['bound_seconds']:8.2f} ms by {report['bound_by']}: no less time at "
            "published peaks; a bound, not a measurement"
        )
    lines.append(f"  compiled in  {report['seconds_to_compile']:8.1f} s")
    return "\n".join(lines)
