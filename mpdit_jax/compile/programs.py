"""Compilation of a run's train step and sampler for devices that need not exist."""

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
from mpdit_jax.compile.environment import find_cuda_compiler
from mpdit_jax.compile.flops import product_flops_by_library
from mpdit_jax.compile.gpus import Cluster, target_config
from mpdit_jax.config.base import model_config
from mpdit_jax.data.latents import LatentSpace
from mpdit_jax.distributed.mesh import batch_sharding, check_batch, replicated
from mpdit_jax.errors import ConfigError, MissingExtraError, first_line, install_extra
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.flow.sampler import make_sampler
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.parameters import abstract, merge
from mpdit_jax.runtime.hardware import GIB
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state
from mpdit_jax.train.step import build_train_step, jit_step

_UNITS = {"M": GIB / 1024, "G": GIB, "T": 1024 * GIB}  # libtpu's units of memory
_VIEWS = 2  # views per image in a store made with --flip=both


@dataclasses.dataclass(frozen=True)
class Program:
    """Memory, operations and traffic of a compiled program, per device."""

    arguments: int  # bytes of the arguments, such as parameters and optimizer state
    temporaries: int  # bytes of temporaries; the compiler's early estimate if `refused`
    results: int  # bytes of the results, donated buffers included; 0 if `refused`
    peak: int  # bytes in all; donated buffers count once
    compiled_flops: int | None  # operations of the matrix products, recomputation included; None if `refused`
    collectives: dict[str, int] | None  # bytes of the arrays that collectives move, by kind; None if `refused`
    sent: float | None  # bytes that the device sends inside its host or slice; None if `refused`
    seconds_to_compile: float  # seconds of lowering and compiling on this machine
    refused: bool = False  # whether the compiler gave up because the chip's memory is too small
    # Bytes that it sends to other hosts, which are not in `sent`; None if `refused`.
    crossed: float | None = 0.0
    products: dict[str, int] | None = None  # `compiled_flops` by what computes them, such as cuBLAS
    overlapped: int = 0  # collectives of a GPU's program that run beside its computation
    waited_for: int = 0  # those that do not


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """Return the devices of several slices of a TPU topology, none of which need exist.

    Raise MissingExtraError if libtpu is not installed, and ConfigError if it does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError(
            f"--topology={topology} needs libtpu: {install_extra('tpu')}, or give --devices (no TPU is needed)."
        )
    # On a real v4, JAX sees the two cores of a chip as one device ("megacore").
    more: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if slices > 1:
        more["num_slices"] = slices
    try:
        rows, columns, *_ = map(int, topology.partition(":")[2].split("x"))
        host = (min(rows, 2), min(columns, 2), 1)  # by default libtpu assumes hosts of 2x2 chips and refuses fewer
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=host, **more
        )
        return list(description.devices)
    except Exception as error:  # libtpu has no exceptions of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--topology={topology}: libtpu refuses it ({reason[:200]}).") from error


def gpu_devices(cluster: Cluster, topology: str) -> list[jax.Device]:
    """Return the devices of GPUs that need not exist; `prepare(gpus=True)` comes first.

    Raise MissingExtraError if their compiler is not installed, and ConfigError if it refuses the topology.
    """
    target = target_config(cluster.card, find_cuda_compiler().version)
    jax.devices()  # JAX finds its plugins
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology,
            target_config=target,
            topology=f"1x{cluster.hosts}x{cluster.per_host}",
        )
        return list(description.devices)
    except Exception as error:  # as above
        raise ConfigError(f"--topology={topology}: XLA refuses it ({first_line(error)[:200]}).") from error


def compile_step(config: FrozenConfigDict, mesh: Mesh, per_host: int = 0) -> Program:
    """Compile the train step of a config. Raise ConfigError if the batch does not divide over the mesh.

    `per_host` is the number of devices of a host; 0 if all are linked alike.
    """
    check_batch(config.batch_size, mesh, config.gradient_accumulation)
    model, optimizer = _model_for(config, mesh), make_optimizer(config.optimizer)
    state = abstract_state(model, optimizer, mesh)
    channels = model.in_channels
    latents = LatentSpace((0.0,) * channels, (1.0,) * channels, "") if config.data.name == "latents" else None
    step = build_train_step(config, abstract(model)[0], optimizer, latents)

    def batch_array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=batch_sharding(mesh))

    example = (*model.input_size, channels)
    batch = {"y": batch_array((), jnp.int32)}
    if latents is None:
        batch["x"] = batch_array(example, jnp.float32)
    else:
        batch |= {name: batch_array((_VIEWS, *example), jnp.float16) for name in ("mean", "std")}
    with jax.set_mesh(mesh):
        return _compile(mesh.size, per_host, jit_step(step, state, mesh), state, batch)


def compile_sampler(config: FrozenConfigDict, mesh: Mesh, batch_size: int, per_host: int = 0) -> Program:
    """Compile the guided sampler of a config with replicated parameters. Raise ConfigError as `compile_step`."""
    check_batch(batch_size, mesh)
    structure, shapes = abstract(_model_for(config, mesh))
    sampler = make_sampler(config.sample.solver, config.sample.steps, config.sample.guidance_scale)
    whole, split = replicated(mesh), batch_sharding(mesh)

    def draw(parameters: Any, labels: jax.Array, seed: jax.Array) -> jax.Array:
        return sampler(merge(structure, parameters), labels, seed_key(seed))

    parameters = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole) for name, leaf in shapes.items()}
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=split)
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole)
    with jax.set_mesh(mesh):
        return _compile(mesh.size, per_host, jax.jit(draw, out_shardings=split), parameters, labels, seed)


def _model_for(config: FrozenConfigDict, mesh: Mesh) -> ModelConfig:
    """Return the model config for the platform of the mesh; virtual CPU devices stand for GPUs."""
    model, platform = model_config(config), mesh.devices.flat[0].platform
    return model.replace(platform="gpu" if platform == "cpu" else platform) if model.platform == "auto" else model


def _compile(chips: int, per_host: int, function: Any, *arguments: Any) -> Program:
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(str(error), arguments, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    moved, products = traffic(text, chips, per_host), product_flops_by_library(text)
    return Program(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes,
        peak=total - memory.alias_size_in_bytes,
        compiled_flops=sum(products.values()),
        collectives=moved.by_kind,
        sent=moved.sent,
        crossed=moved.crossed,
        products=products,
        overlapped=moved.overlapped,
        waited_for=moved.waited_for,
        seconds_to_compile=seconds,
    )


def _refused(message: str, arguments: Any, seconds: float) -> Program:
    """Parse the memory needed from an out-of-memory error of the compiler. Raise ConfigError for any other error."""
    leaves = jax.tree.leaves(arguments)
    size = sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    temporaries = _parse_size(r"memory required for HLO temporaries \((SIZE)\)", message)
    used = _parse_size("Used (SIZE) of ", message)
    if temporaries is not None:
        peak = size + temporaries
    elif used is not None:
        peak, temporaries = used, max(used - size, 0)
    else:
        raise ConfigError(f"the compiler refuses this program: {message.strip().splitlines()[0][:300]}")
    return Program(size, temporaries, 0, peak, None, None, None, seconds, refused=True, crossed=None)


def _parse_size(pattern: str, message: str) -> int | None:
    """Return the bytes that the message has in the pattern's place of SIZE, such as 26.55G."""
    match = re.search(pattern.replace("SIZE", r"[\d.]+[MGT]"), message)
    return int(float(match[1][:-1]) * _UNITS[match[1][-1]]) if match else None
