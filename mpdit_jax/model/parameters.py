"""A module as (structure, parameters), where the parameters are a flat dict from dotted path to array.

The flat dict, `{"levels.0.blocks.layers.mlp.inner.kernel": array, ...}`, is what the project trains, averages, shards,
saves and converts. Names in sharding rules, error messages and files are therefore the names in the code.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import jax
from flax import nnx

from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.presets import build_model

ModuleT = TypeVar("ModuleT", bound=nnx.Module)
Parameters: TypeAlias = dict[str, jax.Array]
Structure: TypeAlias = nnx.GraphDef[MPDiT]


def split(module: ModuleT) -> tuple[nnx.GraphDef[ModuleT], Parameters]:
    """Split a module into a hashable structure (a static argument of jit) and its arrays, which are not copied."""
    structure, state = nnx.split(module)
    return structure, _flatten(state)


def merge(structure: nnx.GraphDef[ModuleT], parameters: Mapping[str, Any]) -> ModuleT:
    """Rebuild the module from the results of `split`. The arrays may be tracers."""
    leaves: list[Any] = [(tuple(_key(part) for part in path.split(".")), leaf) for path, leaf in parameters.items()]
    return nnx.merge(structure, nnx.from_flat_state(leaves))


def abstract(config: ModelConfig) -> tuple[Structure, dict[str, jax.ShapeDtypeStruct]]:
    """Return the structure and the parameter shapes of a model without allocating it."""
    structure, shapes = _abstract(config)
    return structure, dict(shapes)


@lru_cache(maxsize=8)  # a command asks several times for the one model it has, and tracing it takes a while
def _abstract(config: ModelConfig) -> tuple[Structure, dict[str, jax.ShapeDtypeStruct]]:
    structure, state = nnx.split(nnx.eval_shape(lambda: build_model(config, jax.random.key(0))))
    # Without the caller's mesh, which the cache does not know.
    return structure, {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in _flatten(state).items()}


def _flatten(state: nnx.State) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.as_pure(state))}


def _key(part: str) -> str | int:
    return int(part) if part.isdigit() else part
