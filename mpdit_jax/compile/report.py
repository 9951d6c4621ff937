"""Reports on compiled programs, and the settings to try if a program does not fit."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.compile.gpus import Card
from mpdit_jax.compile.programs import Program
from mpdit_jax.config.base import model_config
from mpdit_jax.model.accounting import count_macs, recomputed_macs, training_flops
from mpdit_jax.runtime.hardware import GIB, Chip

_POOL_NOTE = ", JAX's pool (0.75 of the memory)"
_MIN_IMAGES_PER_PART = 8  # per chip, without remat `full`; at 64 coarse tokens they make 512 rows of a product


def step_flops(config: FrozenConfigDict) -> float:
    """Count the floating-point operations of a train step on all chips, recomputation by remat included."""
    model = model_config(config)
    recomputed = 2 * recomputed_macs(model, config.mask_ratio)
    return float(config.batch_size * (training_flops(model, config.mask_ratio) + recomputed))


def sampler_flops(config: FrozenConfigDict, batch_size: int) -> float:
    """Count the floating-point operations of a guided sampling run on all chips."""
    model = model_config(config)
    passes = 1 if config.sample.guidance_scale == 1 or model.guidance_max > 1 else 2
    return 2.0 * count_macs(model) * batch_size * config.sample.steps * passes


def describe(program: Program, flops: float, chips: int, chip: Chip | Card | None) -> dict[str, Any]:
    """Return a program's figures per device.

    Args:
        program: the compiled program.
        flops: its operations on all devices.
        chips: number of devices.
        chip: kind of the devices; None if it is unknown.
    """
    report: dict[str, Any] = {**dataclasses.asdict(program), "flops": flops / chips}
    if chip is not None:
        report["hbm"] = chip.hbm
        report["fits"] = not program.refused and program.peak <= chip.hbm
        moved = program.arguments + program.results
        bounds = chip.bounds(flops / chips, moved, program.sent or 0, program.crossed or 0)
        report["bound_by"], report["bound_seconds"] = max(bounds.items(), key=lambda item: item[1])
    return report


def smaller(config: FrozenConfigDict, chips: int) -> Iterator[tuple[str, FrozenConfigDict]]:
    """Yield settings that need less memory, as (flags, config), in the order of the time they cost.

    Each remat policy is tried with the config's fsdp and with the largest fsdp that divides the model's width, and then
    with gradient accumulation. Accumulation recomputes nothing, but gathers the parameters for every part, and products
    of few rows leave a chip idle; so parts of fewer than eight images per chip are tried with remat `full` alone.
    """
    policies = ["none", "dots", "full"]
    policies = policies[policies.index(config.model.remat) :]
    current = chips // config.mesh.data if config.mesh.fsdp == -1 else config.mesh.fsdp
    largest = math.gcd(chips, model_config(config).hidden_size)
    splits = [config.mesh.fsdp] + [largest] * (largest > current)
    # `dots` repeats 1 % of the operations and comes before accumulation; `full` repeats a third and comes after it.
    for min_images, group in ((_MIN_IMAGES_PER_PART, [name for name in policies if name != "full"]), (1, ["full"])):
        for remat, fsdp in itertools.product(group, splits):
            if (remat, fsdp) != (config.model.remat, config.mesh.fsdp):
                yield _with_settings(config, remat, fsdp, config.gradient_accumulation)
        for parts, remat in itertools.product(_parts(config, chips, min_images), group):
            yield _with_settings(config, remat, splits[-1], parts)


def smaller_batches(batch_size: int, chips: int) -> Iterator[int]:
    """Yield sampling batches, each half of the previous one, down to one image per chip."""
    images = batch_size // chips
    while images > 1:
        images //= 2
        yield images * chips


def _parts(config: FrozenConfigDict, chips: int, min_images: int) -> Iterator[int]:
    """Yield doubled values of gradient_accumulation while a part has `min_images` images per chip."""
    parts = 2 * config.gradient_accumulation
    while config.batch_size % (parts * chips) == 0 and config.batch_size // (parts * chips) >= min_images:
        yield parts
        parts *= 2


def _with_settings(config: FrozenConfigDict, remat: str, fsdp: int, parts: int) -> tuple[str, FrozenConfigDict]:
    # to_dict() copies; several ConfigDict(config) of one frozen config would share its nested values.
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


def as_text(name: str, report: dict[str, Any], device: str = "chip") -> str:
    """Format one program's report as lines of text; `device` is the word for what it runs on."""
    lines = [
        f"{name}, per {device}",
        f"  arguments    {report['arguments'] / GIB:8.2f} GiB",
        f"  temporaries  {report['temporaries'] / GIB:8.2f} GiB",
        f"  peak         {report['peak'] / GIB:8.2f} GiB",
    ]
    if "hbm" in report:
        verdict = "fits" if report["fits"] else "does NOT fit"
        lines[-1] += f"  {verdict} {report['hbm'] / GIB:.2f} GiB{_POOL_NOTE * (device == 'GPU')}"
    if report["refused"]:
        lines[2] += "  by the compiler's early estimate, after which it gave up"
    lines.append(f"  analytic     {report['flops'] / 1e12:8.3f} TFLOP")
    if report["compiled_flops"] is not None:
        lines.append(f"  compiled     {report['compiled_flops'] / 1e12:8.3f} TFLOP in matrix products")
        if device == "GPU" and report["products"]:
            shares = {name: flops / report["compiled_flops"] for name, flops in report["products"].items() if flops}
            lines[-1] += ": " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    if report["collectives"] is not None:
        moved = {kind: size for kind, size in report["collectives"].items() if size}
        listed = ", ".join(f"{kind} {size / GIB:.3f} GiB" for kind, size in moved.items()) or "none"
        sent = f"sent {report['sent'] / GIB:.3f} GiB"
        if device == "GPU" or report["crossed"]:
            sent += f" by {'NVLink' if device == 'GPU' else 'links'}, {report['crossed'] / GIB:.3f} GiB by network"
        lines.append(f"  collectives  {listed}; {sent}")
        if report["overlapped"] + report["waited_for"]:
            lines.append(f"               {report['overlapped']} overlap with products, {report['waited_for']} do not")
    if "bound_seconds" in report:
        lines.append(
            f"  bound        {1e3 * report['bound_seconds']:8.2f} ms by {report['bound_by']}: no less time at "
            "published peaks; a bound, not a measurement"
        )
    lines.append(f"  compiled in  {report['seconds_to_compile']:8.1f} s")
    return "\n".join(lines)
