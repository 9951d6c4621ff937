"""Mesh axes of type Explicit, JAX's default: models compute over automatic ones, and calls enter those here."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

T = TypeVar("T")


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
    """The mesh with Explicit axes that is set, or that an array of a tree lies on."""
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _split_rows(array: Any) -> Any:
    """The Explicit axes that split an array's first dimension, as a part of a PartitionSpec; None for none."""
    spec = jax.typeof(array).sharding.spec if isinstance(array, jax.Array) else PartitionSpec()
    return spec[0] if len(spec) else None
