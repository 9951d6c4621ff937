"""The device mesh and the sharding rules of every array.

The mesh has two axes. `data` splits the batch; `fsdp` splits the batch, and also parameters, optimizer state and EMA.
The sequence is never split. On one device both axes have size 1 and nothing is split. Models compute over automatic
axes; arrays on a caller's mesh of Explicit axes, JAX's default, enter them through `with_auto_axes`.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mpdit_jax.errors import ConfigError

AXES = ("data", "fsdp")
T = TypeVar("T")

# The first pattern that matches a parameter's dotted path gives the dimension that `fsdp` splits. If its size is not
# divisible by the axis, the last dimension is split instead; if that is not divisible either, the array is replicated.
# The first dimension of stacked layers is the layer index, over which a scan runs; it is never split.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    ("levels.*.blocks.layers.*.kernel", PartitionSpec(None, "fsdp", None)),  # (layers, in, out)
    ("levels.*.conv.kernel", PartitionSpec(None, None, "fsdp", None)),  # (rows, columns, in, out)
    ("*.kernel", PartitionSpec("fsdp", None)),  # (in, out)
    ("class_embedding.table", PartitionSpec(None, "fsdp")),  # (classes + 1, tokens * width)
    ("*", PartitionSpec()),  # biases, FNO weights: 0.2 % of mpdit_b
)


def make_mesh(data: int = -1, fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Build a (data, fsdp) mesh with axes of type Auto.

    Args:
        data: size of the data axis; -1 for the number of devices divided by `fsdp`.
        fsdp: size of the fsdp axis; -1 for the number of devices divided by `data`.
        devices: the devices; default all devices of all processes.

    Raises:
        ConfigError: the product of the axes is not the number of devices, or `fsdp` would cross TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    count, sizes = len(devices), {"data": data, "fsdp": fsdp}
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(
                f"mesh.{axis}={size}: expected a positive number of devices, or -1 for all that are left."
            )
    if data == fsdp == -1:
        raise ConfigError("mesh.data=-1 and mesh.fsdp=-1: at most one axis can take the devices that are left.")
    if data == -1:
        sizes["data"] = max(count // fsdp, 1)
    elif fsdp == -1:
        sizes["fsdp"] = max(count // data, 1)
    if sizes["data"] * sizes["fsdp"] != count:
        raise ConfigError(
            f"mesh.data={data}, mesh.fsdp={fsdp} does not fit {count} {devices[0].platform} device(s): "
            f"the product must be {count}; set one axis to a divisor of {count} and the other to -1."
        )
    return Mesh(_device_grid(sizes["data"], sizes["fsdp"], devices), AXES, axis_types=(AxisType.Auto,) * 2)


def _device_grid(data: int, fsdp: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Arrange the devices as (data, fsdp) with the devices of an fsdp group close together.

    `jax.make_mesh` cannot do this: it refuses GPUs of several hosts, and most shapes on TPU slices other than v5e.
    """
    slices = {device.slice_index for device in devices} if hasattr(devices[0], "slice_index") else {0}
    if devices[0].platform != "tpu" or len(slices) == 1:
        return mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    if data % len(slices):
        raise ConfigError(
            f"mesh.data={data}, mesh.fsdp={fsdp} does not fit {len(slices)} TPU slices: a state may "
            f"not be split over two; expected a mesh.data that is a multiple of {len(slices)}."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // len(slices), fsdp), (len(slices), 1), devices, allow_split_physical_axes=True
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the first dimension, the batch, over both axes."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of the parameter at dotted `path`, given by the first matching row of `PARAMETER_RULES`."""
    spec = next(spec for pattern, spec in PARAMETER_RULES if fnmatchcase(path, pattern))
    outputs = PartitionSpec(*[None] * (len(spec) - 1), "fsdp")
    for candidate in (spec, outputs):
        if all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(candidate, shape, strict=False)):
            return NamedSharding(mesh, candidate)
    return replicated(mesh)


def check_batch(batch_size: int, mesh: Mesh, parts: int = 1, name: str = "batch_size") -> None:
    """Raise ConfigError unless the global batch divides over the mesh's devices.

    `parts` is the number of gradient accumulation steps, `name` the setting's name in the error.
    """
    unit = mesh.size * parts
    if batch_size % unit:
        accumulation = f" in gradient_accumulation={parts} parts" if parts > 1 else ""
        raise ConfigError(
            f"{name}={batch_size} does not divide over {mesh.size} devices{accumulation}: "
            f"use a multiple of {unit}, such as {-(-batch_size // unit) * unit}."
        )


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Return the rows of a global batch that this process's devices hold, ascending."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in indices if index is not None]))


def place_batch(local: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Build a global batch, split over the mesh, from every process's arrays (len(rows), ...) of its `local_rows`."""
    sharding = batch_sharding(mesh)
    if len(rows) == batch_size:
        return jax.device_put(dict(local), sharding)

    def place(array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            return array if index is None else array[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, shard)

    return {name: place(array) for name, array in local.items()}


def constrain_batch(x: jax.Array) -> jax.Array:
    """Constrain `x` (batch first) to be split over the mesh of `jax.set_mesh`.

    Without this, XLA replicates the activations inside a scan whose weights are sharded. The array is returned
    unchanged without such a mesh, inside `shard_map`, and if the batch does not divide over the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.auto_axes) or mesh.size == 1 or x.shape[0] % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(AXES, *[None] * (x.ndim - 1)))


def with_auto_axes(
    function: Callable[..., T],
    models: Sequence[nnx.Module | None],
    arrays: Sequence[Any],
    batched: Sequence[Any],
    out: Any,
) -> T:
    """Return `function(*models, *arrays)`, computed with axes of type Explicit as automatic ones.

    Without such axes, as in training and inside `jax.shard_map`, this is the call itself.

    Args:
        function: what to compute.
        models: its first arguments.
        arrays: its other arguments, pytrees of arrays and numbers.
        batched: arrays, or None, with the batch as their first dimension: the first that is split over Explicit axes
            says how the batch of the results is split. (A result's batch is whole if none is.)
        out: a prefix of the result's tree with the position of the batch dimension, -1 for none.
    """
    mesh = _explicit_mesh((*(None if model is None else nnx.state(model) for model in models), *arrays))
    if mesh is None:
        return function(*models, *arrays)
    parts = [(None, None) if model is None else nnx.split(model) for model in models]
    structures, states = [part[0] for part in parts], [part[1] for part in parts]

    def compute(states: Sequence[Any], *arrays: Any) -> T:
        merged = [
            None if structure is None else nnx.merge(structure, state)
            for structure, state in zip(structures, states, strict=True)
        ]
        return function(*merged, *arrays)

    rows = next((found for found in map(_split_rows, batched) if found is not None), None)
    specs = jax.tree.map(lambda at: PartitionSpec(*[None] * at, rows) if at >= 0 else PartitionSpec(), out)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    # The states are arguments: an array that is closed over would keep the mesh that it lies on.
    entered = jax.sharding.auto_axes(compute, axes=tuple(mesh.explicit_axes), out_sharding=shardings)
    result: T = entered(states, *arrays)
    return result


def _explicit_mesh(tree: Any) -> AbstractMesh | None:
    """Return the mesh with Explicit axes that is set, or that an array of a tree lies on."""
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _split_rows(array: Any) -> Any:
    """Return the Explicit axes that split an array's first dimension, as a part of a PartitionSpec; None for none."""
    spec = jax.typeof(array).sharding.spec if isinstance(array, jax.Array) else PartitionSpec()
    return spec[0] if len(spec) else None
