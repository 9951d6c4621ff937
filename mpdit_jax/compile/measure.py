"""The report on a config's train step and sampler, compiled for devices that this machine lacks.

If a program does not fit, settings that need less memory are compiled until one fits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.compile.gpus import Card, parse_cluster
from mpdit_jax.compile.programs import compile_sampler, compile_step, gpu_devices, topology_devices
from mpdit_jax.compile.report import as_text, describe, sampler_flops, smaller, smaller_batches, step_flops
from mpdit_jax.config.base import resolve
from mpdit_jax.distributed.mesh import check_batch, make_mesh
from mpdit_jax.errors import ConfigError
from mpdit_jax.runtime.hardware import Chip, topology_chip

Measurement: TypeAlias = dict[str, Any]
Log: TypeAlias = Callable[[str], object]


class Target(NamedTuple):
    """The devices to compile for."""

    devices: list[jax.Device]
    chip: Chip | Card | None  # their kind; None if it is unknown
    per_host: int  # devices of a host, or of a slice of a TPU pod; 0 if all are linked alike
    noun: str  # the word for one of them


def measure(
    config: ConfigDict | FrozenConfigDict,
    *,
    topology: str = "",
    slices: int = 1,
    devices: int = 0,
    sample_batch: int = 0,
    sampler: bool = True,
    search: bool = True,
    log: Log = print,
) -> Measurement:
    """Compile a config's train step and sampler; return the report as plain numbers and strings.

    Args:
        config: an experiment's config, see `mpdit_jax.config.base_config`.
        topology: TPU topology such as v5e:16x16, or GPUs such as a100:8; default JAX's own devices.
        slices: number of slices of a TPU topology, linked by a network; the data axis goes over them.
        devices: without a topology, the number of devices that JAX must have; 0 for any number.
        sample_batch: number of images the sampler draws; default 8 per chip.
        sampler: also compile the sampler.
        search: if a program does not fit, search for a setting that does.
        log: called with each line of text.

    Raises:
        ConfigError: an unknown topology, or a mesh or batch size that does not fit it.
        MissingExtraError: libtpu or XLA's compiler for GPUs is not installed.
    """
    target, resolved = _target(topology, slices), resolve(config)
    available = target.devices
    if devices and len(available) != devices:
        raise ConfigError(f"--devices={devices}: JAX has {len(available)}; unset XLA_FLAGS and JAX_PLATFORMS.")
    if resolved.model.attention == "cudnn":
        raise ConfigError(
            "config.model.attention='cudnn' needs cuDNN's library and an NVIDIA GPU to compile: use 'xla'."
        )
    mesh = make_mesh(**resolved.mesh, devices=available)
    sample_batch = sample_batch or 8 * mesh.size
    check_batch(sample_batch, mesh, name="--sample_batch")  # before minutes of compilation
    where = (
        f"{slices} x {topology}"
        if slices > 1
        else topology or f"{mesh.size} {'virtual CPU ' if devices else ''}devices"
    )
    shape = f"data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}"
    chips = f"{mesh.size} {target.noun}{'s' * (mesh.size > 1)}"
    log(f"{where}: {chips} as {shape}, batches of {resolved.batch_size}, remat {resolved.model.remat}")
    if not topology and available[0].platform == "cpu":
        log("memory is what the CPU's compiler needs; on GPUs products and traffic are the same, temporaries differ")
    report: Measurement = {"where": where, "chips": mesh.size, "mesh": shape, "batch_size": resolved.batch_size}
    report |= _step(resolved, mesh, target, search, log)
    if sampler:
        report |= _sampler(resolved, mesh, target, sample_batch, search, log)
    return report


def _target(topology: str, slices: int) -> Target:
    """Return what a topology describes; without one, JAX's own devices."""
    cluster = parse_cluster(topology)
    if slices != 1 and (cluster is not None or not topology or slices < 1):
        raise ConfigError(f"--slices={slices}: expected 1 or more, of a TPU's --topology such as v5e:16x16.")
    if not topology:
        return Target(jax.devices(), None, 0, "chip")
    if cluster is not None:
        return Target(gpu_devices(cluster, topology), cluster.card, cluster.per_host, "GPU")
    chip, devices = topology_chip(topology), topology_devices(topology, slices)
    return Target(devices, chip, len(devices) // slices if slices > 1 else 0, "chip")


def _step(config: FrozenConfigDict, mesh: Mesh, target: Target, search: bool, log: Log) -> Measurement:
    """Report on the train step as `step`; if it does not fit, on the first setting that does as `nearest_fit`."""

    def compiled(config: FrozenConfigDict, mesh: Mesh) -> Measurement:
        program = compile_step(config, mesh, target.per_host)
        return describe(program, step_flops(config), mesh.size, target.chip)

    step = compiled(config, mesh)
    log(as_text("train step", step, target.noun))
    if step.get("fits", True) or not search:
        return {"step": step}
    arguments = {config.mesh.fsdp: step["arguments"]}  # the size of state and batch depends on fsdp alone
    for flags, candidate in smaller(config, mesh.size):
        if arguments.get(candidate.mesh.fsdp, 0) >= step["hbm"]:
            continue
        log(f"trying {flags} ...")
        candidate_mesh = make_mesh(**candidate.mesh, devices=list(mesh.devices.flat))
        result = compiled(candidate, candidate_mesh)
        arguments[candidate.mesh.fsdp] = result["arguments"]
        if result["fits"]:
            log(as_text(f"nearest setting that would fit: {flags}; train step", result, target.noun))
            return {"step": step, "nearest_fit": {"flags": flags, **result}}
    log(f"nothing tried fits: take more {target.noun}s or a smaller batch_size.")
    return {"step": step}


def _sampler(
    config: FrozenConfigDict, mesh: Mesh, target: Target, batch_size: int, search: bool, log: Log
) -> Measurement:
    """Report on the sampler as `sampler`; if it does not fit, on a smaller batch that does as `nearest_sampler_fit`."""

    def compiled(size: int) -> Measurement:
        program = compile_sampler(config, mesh, size, target.per_host)
        return {"batch_size": size, **describe(program, sampler_flops(config, size), mesh.size, target.chip)}

    sampler = compiled(batch_size)
    log(as_text(f"sampler of {batch_size} images, {config.sample.steps} steps", sampler, target.noun))
    if sampler.get("fits", True) or not search:
        return {"sampler": sampler}
    parameters_fit = sampler["arguments"] < sampler["hbm"]  # a smaller batch has the same parameters
    for size in smaller_batches(batch_size, mesh.size) if parameters_fit else ():
        flags = f"--sample_batch={size}"
        log(f"trying {flags} ...")
        result = compiled(size)
        if result["fits"]:
            log(as_text(f"nearest setting that would fit: {flags}; sampler", result, target.noun))
            return {"sampler": sampler, "nearest_sampler_fit": {"flags": flags, **result}}
    log(f"no batch tried fits: every {target.noun} holds all parameters to sample; take one of more memory.")
    return {"sampler": sampler}
