"""A model as (structure, parameters): the parameters one flat dict from dotted path to array.

The flat dict is what is trained, averaged, sharded, saved and converted: `{"levels.0.blocks.layers.mlp.inner.kernel":
array, ...}`. A name in a rule, an error or a file is then the name in the code.
"""

from typing import Any, TypeAlias

import jax
from flax import nnx

from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.presets import build_model

Parameters: TypeAlias = dict[str, jax.Array]
Structure: TypeAlias = nnx.GraphDef[MPDiT]


def split(model: MPDiT) -> tuple[Structure, Parameters]:
    """Take a model apart. The structure is hashable (a static argument of jit); the arrays are shared, not copied."""
    structure, state = nnx.split(model)
    return structure, _flatten(state)


def merge(structure: Structure, parameters: Parameters) -> MPDiT:
    """Inverse of `split`; the arrays may be tracers."""
    leaves: list[Any] = [(tuple(_key(part) for part in path.split(".")), leaf) for path, leaf in parameters.items()]
    return nnx.merge(structure, nnx.from_flat_state(leaves))


def abstract(config: ModelConfig) -> tuple[Structure, dict[str, jax.ShapeDtypeStruct]]:
    """Structure and shapes of a model, without allocating it."""
    structure, state = nnx.split(nnx.eval_shape(lambda: build_model(config, jax.random.key(0))))
    return structure, _flatten(state)


def _flatten(state: nnx.State) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.as_pure(state))}


def _key(part: str) -> str | int:
    return int(part) if part.isdigit() else part
