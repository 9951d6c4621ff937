"""Devices and sharding: the mesh, and the one table that says how every array lies on it.

The mesh has two axes. `data` splits the batch; `fsdp` splits the batch too and, with it, parameters, optimizer state
and EMA. Nothing is split along the sequence. With one device both axes have size 1 and everything below is a no-op.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mpdit_jax.errors import ConfigError

AXES = ("data", "fsdp")

# The first pattern that matches a parameter's dotted path says which dimension `fsdp` splits. Stacked layers carry
# the layer index first, which a scan must find whole. Where that dimension does not divide, the last one is
# split; where neither does, as most of a width of 1,152 over an axis of 256, the array stays replicated.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    ("levels.*.blocks.layers.*.kernel", PartitionSpec(None, "fsdp", None)),  # (layers, in, out)
    ("levels.*.conv.kernel", PartitionSpec(None, None, "fsdp", None)),  # (rows, columns, in, out)
    ("*.kernel", PartitionSpec("fsdp", None)),  # (in, out)
    ("class_embedding.table", PartitionSpec(None, "fsdp")),  # (classes + 1, tokens * width)
    ("*", PartitionSpec()),  # biases, FNO weights: 0.2 % of mpdit_b
)


def make_mesh(data: int = -1, fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Arrange the devices as a (data, fsdp) mesh with automatic axes.

    Args:
        data: size of the data axis; -1 takes every device that `fsdp` leaves.
        fsdp: size of the fsdp axis; -1 takes every device that `data` leaves.
        devices: the devices to use; default all of them, of every process.

    Raises:
        ConfigError: the axes do not multiply to the number of devices, or `fsdp` crosses TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    count, sizes = len(devices), {"data": data, "fsdp": fsdp}
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(
                f"mesh.{axis}={size}: expected a positive number of devices, or -1 for all that are left."
            )
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) == 2:
        raise ConfigError("mesh.data=-1 and mesh.fsdp=-1: at most one axis can take the devices that are left.")
    taken = int(np.prod([size for size in sizes.values() if size != -1]))
    if free:
        sizes[free[0]] = max(count // taken, 1)
    if sizes["data"] * sizes["fsdp"] != count:
        raise ConfigError(
            f"mesh.data={data}, mesh.fsdp={fsdp} does not fit {count} {devices[0].platform} device(s): "
            f"the product must be {count}; set one axis to a divisor of {count} and the other to -1."
        )
    return Mesh(_arranged(sizes["data"], sizes["fsdp"], devices), AXES, axis_types=(AxisType.Auto,) * 2)


def _arranged(data: int, fsdp: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as (data, fsdp), those that share a state close together.

    Not by `jax.make_mesh`: it refuses GPUs of several hosts, which count as so many slices, and most ways to cut a TPU
    slice that is no v5e.
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
    """Sharding of an array whose first dimension is the batch: split over both axes, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of the parameter at dotted `path`, by the first matching row of `PARAMETER_RULES`."""
    spec = next(spec for pattern, spec in PARAMETER_RULES if fnmatchcase(path, pattern))
    outputs = PartitionSpec(*[None] * (len(spec) - 1), "fsdp")
    for candidate in (spec, outputs):
        if all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(candidate, shape, strict=False)):
            return NamedSharding(mesh, candidate)
    return replicated(mesh)


def check_batch(batch_size: int, mesh: Mesh, parts: int = 1, name: str = "batch_size") -> None:
    """Raise ConfigError unless the global batch, cut into parts, divides over the mesh's devices.

    Args:
        batch_size: of all devices and parts.
        mesh: the mesh.
        parts: `gradient_accumulation`.
        name: of the setting, for the error.
    """
    unit = mesh.size * parts
    if batch_size % unit:
        cut = f" in gradient_accumulation={parts} parts" if parts > 1 else ""
        raise ConfigError(
            f"{name}={batch_size} does not divide over {mesh.size} devices{cut}: "
            f"use a multiple of {unit}, such as {-(-batch_size // unit) * unit}."
        )


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a global batch this process's devices hold, ascending."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in held if index is not None]))


def place_batch(local: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """A global batch, split over the mesh, of which every process gives its `rows`.

    Args:
        local: arrays (len(rows), ...).
        rows: as `local_rows` tells.
        batch_size: of the whole batch.
        mesh: the mesh.
    """
    sharding = batch_sharding(mesh)
    if len(rows) == batch_size:
        return jax.device_put(dict(local), sharding)

    def place(array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            return array if index is None else array[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, shard)

    return {name: place(array) for name, array in local.items()}


def constrain_batch(x: jax.Array) -> jax.Array:
    """Ask the compiler to keep `x` (batch first) split over the ambient mesh, as set by `jax.set_mesh`.

    Without this the partitioner replicates activations inside a scan whose weights are sharded. Outside a mesh, under
    a caller's own mesh or `shard_map`, or with a batch that does not divide, the array is returned as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.auto_axes) or mesh.size == 1 or x.shape[0] % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(AXES, *[None] * (x.ndim - 1)))
