"""The very step and sampler of a run, compiled for devices that need not exist."""

import dataclasses
import importlib.util
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from mpdit_jax.compile.collectives import traffic
from mpdit_jax.compile.flops import product_flops
from mpdit_jax.config.base import model_config
from mpdit_jax.data.latents import LatentSpace
from mpdit_jax.distributed.mesh import batch_sharding, check_batch, replicated
from mpdit_jax.errors import ConfigError, MissingExtraError, install_extra
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.flow.sampler import make_sampler
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.parameters import abstract, merge
from mpdit_jax.runtime.hardware import GIB
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state
from mpdit_jax.train.step import build_train_step, jit_step

_UNITS = {"M": GIB / 1024, "G": GIB, "T": 1024 * GIB}  # of memory, as libtpu writes them
_VIEWS = 2  # of a store made with --flip=both


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, per chip.

    Attributes:
        arguments: bytes it is given, such as parameters and optimizer state.
        temporaries: bytes it needs beside them.
        results: bytes it returns, those that take the arguments' place included; 0 if `refused`.
        peak: bytes in all while it runs; results that take the arguments' place count once.
        compiled_flops: operations of the compiled matrix products, recomputation included; None if `refused`.
        collectives: bytes of the arrays that go through collectives in a run, by kind; None if `refused`.
        sent: bytes that the chip sends for them; None if `refused`.
        seconds_to_compile: of lowering and compiling, here.
        refused: whether the compiler gave up because the chip's memory is too small. `temporaries` is then its own
            early estimate.
    """

    arguments: int
    temporaries: int
    results: int
    peak: int
    compiled_flops: int | None
    collectives: dict[str, int] | None
    sent: float | None
    seconds_to_compile: float
    refused: bool = False


def topology_devices(topology: str) -> list[jax.Device]:
    """The chips of a TPU topology, of which none need exist.

    Raises:
        MissingExtraError: libtpu is not installed.
        ConfigError: libtpu knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError(
            f"--topology={topology} needs libtpu: {install_extra('tpu')}, or give --devices (no TPU is needed)."
        )
    # On a real v4 the two cores of a chip are one device to JAX; libtpu's description must be told.
    cores = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        rows, columns, *_ = map(int, topology.partition(":")[2].split("x"))
        host = (min(rows, 2), min(columns, 2), 1)  # libtpu takes every host for one of 2x2 chips, and refuses fewer
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=host, **cores
        )
        return list(described.devices)
    except Exception as error:  # libtpu has no exceptions of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--topology={topology}: libtpu refuses it ({reason[:200]}).") from error


def compile_step(config: FrozenConfigDict, mesh: Mesh) -> Program:
    """The train step of a config.

    Raises:
        ConfigError: a batch that does not divide over the mesh.
    """
    check_batch(config.batch_size, mesh, config.gradient_accumulation)
    model, optimizer = _model_for(config, mesh), make_optimizer(config.optimizer)
    state = abstract_state(model, optimizer, mesh)
    channels = model.in_channels
    latents = LatentSpace((0.0,) * channels, (1.0,) * channels, "") if config.data.name == "latents" else None
    step = build_train_step(config, abstract(model)[0], optimizer, latents)

    def of_batch(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=batch_sharding(mesh))

    example = (*model.input_size, channels)
    batch = {"y": of_batch((), jnp.int32)}
    if latents is None:
        batch["x"] = of_batch(example, jnp.float32)
    else:
        batch |= {name: of_batch((_VIEWS, *example), jnp.float16) for name in ("mean", "std")}
    with jax.set_mesh(mesh):
        return _compile(mesh.size, jit_step(step, state, mesh), state, batch)


def compile_sampler(config: FrozenConfigDict, mesh: Mesh, batch_size: int) -> Program:
    """The guided sampler of a config, `config.sample.steps` Euler steps, parameters replicated.

    Raises:
        ConfigError: a batch that does not divide over the mesh.
    """
    check_batch(batch_size, mesh)
    structure, shapes = abstract(_model_for(config, mesh))
    sampler = make_sampler(steps=config.sample.steps, guidance_scale=config.sample.guidance_scale)
    everywhere, split = replicated(mesh), batch_sharding(mesh)

    def draw(parameters: Any, labels: jax.Array, seed: jax.Array) -> jax.Array:
        return sampler(merge(structure, parameters), labels, seed_key(seed))

    parameters = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere) for name, leaf in shapes.items()
    }
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=split)
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=everywhere)
    with jax.set_mesh(mesh):
        return _compile(mesh.size, jax.jit(draw, out_shardings=split), parameters, labels, seed)


def _model_for(config: FrozenConfigDict, mesh: Mesh) -> ModelConfig:
    """The model with the arithmetic of the mesh's devices; virtual CPU devices stand for GPUs."""
    model, platform = model_config(config), mesh.devices.flat[0].platform
    return model.replace(platform="gpu" if platform == "cpu" else platform) if model.platform == "auto" else model


def _compile(chips: int, function: Any, *arguments: Any) -> Program:
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(str(error), arguments, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    given, temporary, results = (
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
    )
    moved = traffic(text, chips)
    return Program(
        arguments=given,
        temporaries=temporary,
        results=results,
        peak=given + temporary + results - memory.alias_size_in_bytes,
        compiled_flops=product_flops(text),
        collectives=moved.by_kind,
        sent=moved.sent,
        seconds_to_compile=seconds,
    )


def _refused(message: str, arguments: Any, seconds: float) -> Program:
    """What a compiler that ran out of the chip's memory says it would have needed.

    Raises:
        ConfigError: it says anything else.
    """
    given = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(arguments)
    )
    temporaries = _size(r"memory required for HLO temporaries \((SIZE)\)", message)
    used = _size("Used (SIZE) of ", message)
    if temporaries is not None:
        peak = given + temporaries
    elif used is not None:
        peak, temporaries = used, max(used - given, 0)
    else:
        raise ConfigError(f"the compiler refuses this program: {message.strip().splitlines()[0][:300]}")
    return Program(given, temporaries, 0, peak, None, None, None, seconds, refused=True)


def _size(pattern: str, message: str) -> int | None:
    """Bytes that a message names where the pattern has SIZE, such as 26.55G."""
    found = re.search(pattern.replace("SIZE", r"[\d.]+[MGT]"), message)
    return int(float(found[1][:-1]) * _UNITS[found[1][-1]]) if found else None
