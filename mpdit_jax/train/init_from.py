"""Starting a run from the weights of another run or of a file (`config.init_from`)."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.checkpoint.load import load_together
from mpdit_jax.config.base import ADAPTABLE
from mpdit_jax.errors import ConfigError, WeightsError
from mpdit_jax.interop.torch_weights import load_torch
from mpdit_jax.io.paths import expand
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.parameters import split
from mpdit_jax.train.state import TrainState

_GUIDANCE = "guidance_embedding."
# Fields of ModelConfig that may differ: what is adapted here, and how a machine computes.
_MAY_DIFFER = {*ADAPTABLE, "null_class", "guidance_max", "remat", "attention", "platform"}
_TABLE = "class_embedding.table"  # (classes + 1, width), with the null class last


def initialize_from(state: TrainState, origin: str, model: ModelConfig) -> TrainState:
    """Return the initial state with parameters and moving average taken from a run's moving average or a file.

    If the number of classes is another, the rows of the class table stay as they were drawn, except that of the null
    class. The optimizer starts afresh. Collective.

    Args:
        state: the state before the first step.
        origin: `config.init_from`, a run's workdir or a file that `mp.load_torch` reads without further arguments. It
            may lack the embedding of the guidance scale, which starts at zero (`model.guidance_max`).
        model: the model of `state`.

    Raises:
        ConfigError: nothing is there, or it is of a model that computes something else.
        CheckpointError, WeightsError: a run or a file that cannot be read.
    """
    arrays, theirs = _read(origin)
    ours = state.parameters
    other_classes = _TABLE in arrays and _TABLE in ours and len(arrays[_TABLE]) != len(ours[_TABLE])
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    if other_classes:
        shapes[_TABLE] = (len(ours[_TABLE]), *shapes[_TABLE][1:])
    new = [name for name in ours if name.startswith(_GUIDANCE) and name not in arrays]
    wrong = [name for name, leaf in ours.items() if name not in new and shapes.get(name) != leaf.shape]
    wrong += [name for name in arrays if name not in ours]
    other = [name for name, value in vars(theirs).items() if name not in _MAY_DIFFER and value != vars(model)[name]]
    if "convention" in other:
        raise ConfigError(
            f"config.init_from={origin} is of convention {theirs.convention!r}: expected weights of a velocity, which "
            "is what is trained here. (DiT and SiT can be sampled, see docs/weights.md.)"
        )
    if other and not wrong:  # the same parameters, used in another way
        differing = ", ".join(f"{name}={vars(theirs)[name]!r} there and {vars(model)[name]!r} here" for name in other)
        raise ConfigError(
            f"config.init_from={origin} has another model than config.model: {differing}. "
            f"Set config.model as there ({', '.join(ADAPTABLE)} may differ)."
        )
    if wrong:
        name = wrong[0]
        here = ours[name].shape if name in ours else "no such parameter"
        there = shapes.get(name, "no such parameter")
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise ConfigError(
            f"config.init_from={origin} has another model than config.model: {name} is {there} there and {here} "
            f"here{more}. Give the config.model of that run ({', '.join(ADAPTABLE)} may differ)."
        )
    taken = {name: leaf for name, leaf in ours.items() if name not in new}
    parameters = ours | {
        name: _with_null_row(leaf, arrays[name]) if name == _TABLE and other_classes else _placed(arrays[name], leaf)
        for name, leaf in taken.items()
    }
    if other_classes and jax.process_index() == 0:
        print(
            f"config.init_from={origin} has {len(arrays[_TABLE]) - 1} classes, and this run {len(ours[_TABLE]) - 1}: "
            "the class embeddings are drawn anew; the null class's and all other parameters are loaded"
        )
    average = jax.tree.map(jnp.copy, parameters)  # donated buffers may not be shared
    return dataclasses.replace(state, parameters=parameters, ema_parameters=average)


def _read(origin: str) -> tuple[Mapping[str, Any], ModelConfig]:
    """Return the parameters at `origin` and the config of their model."""
    path = expand(origin)
    if path.is_dir():
        model = load_together(path)[1]
    elif path.is_file():
        try:
            model = load_torch(path)
        except WeightsError as error:
            raise WeightsError(
                f"config.init_from: {error} If that needs num_heads, convention, num_classes or key, give them to "
                f"`python -m mpdit_jax.convert --source={shlex.quote(origin)} --out=weights.safetensors`, and start "
                "from its file."
            ) from error
    else:
        raise ConfigError(f"config.init_from={origin}: expected the workdir of a run, or a file of weights.")
    return split(model)[1], model.config


def _with_null_row(table: jax.Array, theirs: Any) -> jax.Array:
    """Return `table` with its last row, the null class, taken from the table `theirs`."""
    row = np.asarray(theirs[-1], table.dtype)
    return jax.jit(lambda table: table.at[-1].set(row), out_shardings=table.sharding)(table)


def _placed(array: Any, leaf: jax.Array) -> jax.Array:
    """Give `array`, which is on this process's devices or host, the dtype and sharding of `leaf`."""
    values = np.asarray(array, leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])
