"""A config's step and sampler on machines that are not here: compiled, told, and what would fit if they do not."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.compile.programs import compile_sampler, compile_step, topology_devices
from mpdit_jax.compile.report import (
    as_text,
    describe,
    sampler_flops,
    smaller,
    smaller_batches,
    step_flops,
)
from mpdit_jax.config.base import resolve
from mpdit_jax.distributed.mesh import check_batch, make_mesh
from mpdit_jax.errors import ConfigError
from mpdit_jax.runtime.hardware import Chip, chip_of

Report: TypeAlias = dict[str, Any]
Say: TypeAlias = Callable[[str], object]


def measure(
    config: ConfigDict | FrozenConfigDict,
    *,
    topology: str = "",
    devices: int = 0,
    sample_batch: int = 0,
    sampler: bool = True,
    search: bool = True,
    say: Say = print,
) -> Report:
    """Compile a config's step and sampler and tell; the report as plain numbers and strings.

    Args:
        config: an experiment's config, see `mpdit_jax.config.base_config`.
        topology: of TPUs, such as v5e:16x16; JAX's own devices if empty.
        devices: how many JAX must have, of the CPU, where there is no topology; 0 for any number.
        sample_batch: images the sampler draws; 0 for 8 a chip.
        sampler: whether it is compiled too.
        search: whether settings with less memory are tried where it does not fit.
        say: takes what a person reads meanwhile.

    Raises:
        ConfigError: an unknown topology, a mesh or batch that does not fit it.
        MissingExtraError: libtpu is not installed.
    """
    chip = chip_of(topology) if topology else None
    resolved = resolve(config)
    found = topology_devices(topology) if topology else jax.devices()
    if devices and len(found) != devices:
        raise ConfigError(f"--devices={devices}: JAX has {len(found)}; unset XLA_FLAGS and JAX_PLATFORMS.")
    if resolved.model.attention == "cudnn":
        raise ConfigError("config.model.attention='cudnn' is compiled on an NVIDIA GPU alone: use 'xla'.")
    mesh = make_mesh(**resolved.mesh, devices=found)
    sample_batch = sample_batch or 8 * mesh.size
    check_batch(sample_batch, mesh, name="--sample_batch")  # before minutes of compilation
    where = topology or f"{mesh.size} {'virtual CPU ' if devices else ''}devices"
    shape = f"data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}"
    chips = f"{mesh.size} {'chip' if mesh.size == 1 else 'chips'}"
    say(f"{where}: {chips} as {shape}, batches of {resolved.batch_size}, remat {resolved.model.remat}")
    if not topology and found[0].platform == "cpu":
        say("memory is what the CPU's compiler needs; GPUs share products and traffic, and take other temporaries")
    report: Report = {"where": where, "chips": mesh.size, "mesh": shape, "batch_size": resolved.batch_size}
    report |= _step(resolved, mesh, chip, search, say)
    if sampler:
        report |= _sampler(resolved, mesh, chip, sample_batch, search, say)
    return report


def _step(config: FrozenConfigDict, mesh: Mesh, chip: Chip | None, search: bool, say: Say) -> Report:
    """The report of the config's step as `step` and, where it does not fit, of the first setting that does."""
    step = describe(compile_step(config, mesh), step_flops(config), mesh.size, chip)
    say(as_text("train step", step))
    if step.get("fits", True) or not search:
        return {"step": step}
    given = {config.mesh.fsdp: step["arguments"]}  # state and batch: how much of it, hangs on the split alone
    for flags, candidate in smaller(config, mesh.size):
        if given.get(candidate.mesh.fsdp, 0) >= step["hbm"]:
            continue
        say(f"trying {flags} ...")
        other_mesh = make_mesh(**candidate.mesh, devices=list(mesh.devices.flat))
        other = describe(compile_step(candidate, other_mesh), step_flops(candidate), mesh.size, chip)
        given[candidate.mesh.fsdp] = other["arguments"]
        if other["fits"]:
            say(as_text(f"nearest setting that would fit: {flags}; train step", other))
            return {"step": step, "nearest_fit": {"flags": flags, **other}}
    say("nothing tried fits: take more chips or a smaller batch_size.")
    return {"step": step}


def _sampler(
    config: FrozenConfigDict, mesh: Mesh, chip: Chip | None, batch_size: int, search: bool, say: Say
) -> Report:
    """The report of the sampler as `sampler` and, where it does not fit, of the largest batch tried that does."""

    def measured(size: int) -> Report:
        program = compile_sampler(config, mesh, size)
        return {"batch_size": size, **describe(program, sampler_flops(config, size), mesh.size, chip)}

    sampler = measured(batch_size)
    say(as_text(f"sampler of {batch_size} images, {config.sample.steps} steps", sampler))
    if sampler.get("fits", True) or not search:
        return {"sampler": sampler}
    parameters_fit = sampler["arguments"] < sampler["hbm"]  # fewer images make them no smaller
    for size in smaller_batches(batch_size, mesh.size) if parameters_fit else ():
        flags = f"--sample_batch={size}"
        say(f"trying {flags} ...")
        other = measured(size)
        if other["fits"]:
            say(as_text(f"nearest setting that would fit: {flags}; sampler", other))
            return {"sampler": sampler, "nearest_sampler_fit": {"flags": flags, **other}}
    say("no batch tried fits: every chip holds all parameters to sample; take chips of more memory.")
    return {"sampler": sampler}
