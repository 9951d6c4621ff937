"""Starting a run from the weights of another run or of a file (`config.init_from`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.checkpoint.load import load_together
from mpdit_jax.errors import ConfigError
from mpdit_jax.interop.files import read_state_dict
from mpdit_jax.io.paths import expand
from mpdit_jax.model.parameters import split
from mpdit_jax.train.state import TrainState

_GUIDANCE = "guidance_embedding."


def initialize_from(state: TrainState, origin: str) -> TrainState:
    """Return the initial state with parameters and moving average taken from a run's moving average or a file.

    The optimizer starts afresh. Collective.

    Args:
        state: the state before the first step.
        origin: `config.init_from`, a run's workdir or a `.safetensors` with this project's parameter names. It may
            lack the embedding of the guidance scale, which starts at zero (`model.guidance_max`).

    Raises:
        ConfigError: nothing is there, or its parameters have other names or shapes.
        CheckpointError, WeightsError: a run or a file that cannot be read.
    """
    arrays = _read(origin)
    new = {name: leaf for name, leaf in state.parameters.items() if name.startswith(_GUIDANCE) and name not in arrays}
    expected = {name: leaf for name, leaf in state.parameters.items() if name not in new}
    wrong = [name for name, leaf in expected.items() if name not in arrays or arrays[name].shape != leaf.shape]
    wrong += [name for name in arrays if name not in state.parameters]
    if wrong:
        name = wrong[0]
        ours = state.parameters[name].shape if name in state.parameters else "no such parameter"
        theirs = np.shape(arrays[name]) if name in arrays else "no such parameter"
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise ConfigError(
            f"config.init_from={origin} has another model than config.model: {name} is {theirs} there and {ours} "
            f"here{more}. Give the config.model of that run."
        )
    parameters = {
        name: new[name] if name in new else _placed(arrays[name], leaf) for name, leaf in state.parameters.items()
    }
    average = jax.tree.map(jnp.copy, parameters)  # donated buffers may not be shared
    return dataclasses.replace(state, parameters=parameters, ema_parameters=average)


def _read(origin: str) -> Mapping[str, Any]:
    path = expand(origin)
    if path.is_dir():
        return split(load_together(path)[1])[1]
    if path.suffix != ".safetensors" or not path.is_file():
        raise ConfigError(f"config.init_from={origin}: expected the workdir of a run, or a .safetensors file.")
    return read_state_dict(path)


def _placed(array: Any, leaf: jax.Array) -> jax.Array:
    """An array on this process's devices or host, laid out like `leaf`."""
    values = np.asarray(array, leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])
