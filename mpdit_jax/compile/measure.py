"""The report on a config's train step and sampler, compiled for devices that this machine lacks.

If a program does not fit, settings that need less memory are compiled until one fits.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.compile.programs import compile_sampler, compile_step, topology_devices
from mpdit_jax.compile.report import as_text, describe, sampler_flops, smaller, smaller_batches, step_flops
from mpdit_jax.config.base import resolve
from mpdit_jax.distributed.mesh import check_batch, make_mesh
from mpdit_jax.errors import ConfigError
from mpdit_jax.runtime.hardware import Chip, topology_chip

Measurement: TypeAlias = dict[str, Any]
Log: TypeAlias = Callable[[str], object]


def measure(
    config: ConfigDict | FrozenConfigDict,
    *,
    topology: str = "",
    devices: int = 0,
    sample_batch: int = 0,
    sampler: bool = True,
    search: bool = True,
    log: Log = print,
) -> Measurement:
    """Compile a config's train step and sampler; return the report as plain numbers and strings.

    Args:
        config: an experiment's config, see `mpdit_jax.config.base_config`.
        topology: TPU topology such as v5e:16x16; default JAX's own devices.
        devices: without a topology, the number of devices that JAX must have; 0 for any number.
        sample_batch: number of images the sampler draws; default 8 per chip.
        sampler: also compile the sampler.
        search: if a program does not fit, search for a setting that does.
        log: called with each line of text.

    Raises:
        ConfigError: an unknown topology, or a mesh or batch size that does not fit it.
        MissingExtraError: libtpu is not installed.
    """
    chip = topology_chip(topology) if topology else None
    resolved = resolve(config)
    available = topology_devices(topology) if topology else jax.devices()
    if devices and len(available) != devices:
        raise ConfigError(f"--devices={devices}: JAX has {len(available)}; unset XLA_FLAGS and JAX_PLATFORMS.")
    if resolved.model.attention == "cudnn":
        raise ConfigError("config.model.attention='cudnn' can only be compiled on an NVIDIA GPU: use 'xla'.")
    mesh = make_mesh(**resolved.mesh, devices=available)
    sample_batch = sample_batch or 8 * mesh.size
    check_batch(sample_batch, mesh, name="--sample_batch")  # before minutes of compilation
    where = topology or f"{mesh.size} {'virtual CPU ' if devices else ''}devices"
    shape = f"data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}"
    chips = f"{mesh.size} {'chip' if mesh.size == 1 else 'chips'}"
    log(f"{where}: {chips} as {shape}, batches of {resolved.batch_size}, remat {resolved.model.remat}")
    if not topology and available[0].platform == "cpu":
        log("memory is what the CPU's compiler needs; on GPUs products and traffic are the same, temporaries differ")
    report: Measurement = {"where": where, "chips": mesh.size, "mesh": shape, "batch_size": resolved.batch_size}
    report |= _step(resolved, mesh, chip, search, log)
    if sampler:
        report |= _sampler(resolved, mesh, chip, sample_batch, search, log)
    return report


def _step(config: FrozenConfigDict, mesh: Mesh, chip: Chip | None, search: bool, log: Log) -> Measurement:
    """Report on the train step as `step`; if it does not fit, on the first setting that does as `nearest_fit`."""
    step = describe(compile_step(config, mesh), step_flops(config), mesh.size, chip)
    log(as_text("train step", step))
    if step.get("fits", True) or not search:
        return {"step": step}
    arguments = {config.mesh.fsdp: step["arguments"]}  # the size of state and batch depends on fsdp alone
    for flags, candidate in smaller(config, mesh.size):
        if arguments.get(candidate.mesh.fsdp, 0) >= step["hbm"]:
            continue
        log(f"trying {flags} ...")
        candidate_mesh = make_mesh(**candidate.mesh, devices=list(mesh.devices.flat))
        result = describe(compile_step(candidate, candidate_mesh), step_flops(candidate), mesh.size, chip)
        arguments[candidate.mesh.fsdp] = result["arguments"]
        if result["fits"]:
            log(as_text(f"nearest setting that would fit: {flags}; train step", result))
            return {"step": step, "nearest_fit": {"flags": flags, **result}}
    log("nothing tried fits: take more chips or a smaller batch_size.")
    return {"step": step}


def _sampler(
    config: FrozenConfigDict, mesh: Mesh, chip: Chip | None, batch_size: int, search: bool, log: Log
) -> Measurement:
    """Report on the sampler as `sampler`; if it does not fit, on a smaller batch that does as `nearest_sampler_fit`."""

    def compiled(size: int) -> Measurement:
        program = compile_sampler(config, mesh, size)
        return {"batch_size": size, **describe(program, sampler_flops(config, size), mesh.size, chip)}

    sampler = compiled(batch_size)
    log(as_text(f"sampler of {batch_size} images, {config.sample.steps} steps", sampler))
    if sampler.get("fits", True) or not search:
        return {"sampler": sampler}
    parameters_fit = sampler["arguments"] < sampler["hbm"]  # a smaller batch has the same parameters
    for size in smaller_batches(batch_size, mesh.size) if parameters_fit else ():
        flags = f"--sample_batch={size}"
        log(f"trying {flags} ...")
        result = compiled(size)
        if result["fits"]:
            log(as_text(f"nearest setting that would fit: {flags}; sampler", result))
            return {"sampler": sampler, "nearest_sampler_fit": {"flags": flags, **result}}
    log("no batch tried fits: every chip holds all parameters to sample; take chips of more memory.")
    return {"sampler": sampler}
