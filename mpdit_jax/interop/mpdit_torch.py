"""Published PyTorch names and layouts ⇄ our model, from one table in both directions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import ConfigError, WeightsError
from mpdit_jax.interop.files import normalize_state_dict, read_state_dict
from mpdit_jax.interop.infer import find_problems, infer_config, is_table
from mpdit_jax.interop.published_names import expected_shapes, position_tables, trained_entries
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import Parameters, abstract, merge, split
from mpdit_jax.model.presets import PRESETS, model_config

StateDict = dict[str, np.ndarray]


def load_torch(source: str | Path | Mapping[str, Any], num_heads: int | None = None) -> MPDiT:
    """A model with published PyTorch weights.

    Args:
        source: path of a `.safetensors`, `.pt` or `.pth` (weights only; the key "ema" is preferred), or a mapping from
            the published names to arrays.
        num_heads: attention heads, which no shape tells; default: those of the preset with this width.

    Raises:
        WeightsError: the file cannot be read, or entries are missing, extra or misshapen; all of them are named.
        MissingExtraError: a PyTorch file without PyTorch installed.
    """
    if isinstance(source, Mapping):
        state, origin = normalize_state_dict(source, "state dict"), "state dict"
    else:
        state, origin = read_state_dict(source), str(source)
    config = infer_config(state, origin)
    _check_entries(state, config, origin)
    config = _with_heads(config, num_heads, origin)
    structure, shapes = abstract(config)
    parameters: Parameters = {}
    layers: dict[str, list[np.ndarray]] = {}
    for entry in trained_entries(config):
        array = entry.layout.to_jax(state[entry.name])
        if entry.layer is None:
            parameters[entry.path] = jnp.asarray(array)
        else:
            layers.setdefault(entry.path, []).append(array)
    parameters.update({path: jnp.asarray(np.stack(arrays)) for path, arrays in layers.items()})
    return merge(structure, {path: parameters[path] for path in shapes})


def to_torch(model: MPDiT) -> StateDict:
    """The model's weights under their published PyTorch names, float32 numpy; the exact inverse of `load_torch`."""
    parameters = {path: np.asarray(array) for path, array in split(model)[1].items()}
    state: StateDict = dict(position_tables(model.config))
    for entry in trained_entries(model.config):
        array = parameters[entry.path]
        state[entry.name] = entry.layout.to_torch(array if entry.layer is None else array[entry.layer])
    return state


def _check_entries(state: Mapping[str, np.ndarray], config: ModelConfig, origin: str) -> None:
    """Raise WeightsError unless the entries are exactly that config's, finite, with the tables that it computes."""
    problems = find_problems(state, config)
    fitting = [name for name, shape in expected_shapes(config).items() if name in state and state[name].shape == shape]
    tables = dict(position_tables(config))
    problems["not finite"] = [name for name in fitting if not np.isfinite(state[name]).all()]
    problems["not the fixed sin-cos position table"] = [
        name for name in fitting if name in tables and not is_table(state[name], tables[name])
    ]
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise WeightsError(
            f"{origin} does not fit the model it describes (depths {config.depths}, width {config.hidden_size}): "
            f"{'; '.join(found)}. Expected the published MPDiT names; this has {len(state)} entries, such as "
            f"{', '.join(list(state)[:3]) or 'none'}."
        )


def _with_heads(config: ModelConfig, num_heads: int | None, origin: str) -> ModelConfig:
    """The config with its heads: those given, or those of the preset with this width."""
    width = config.hidden_size
    if num_heads is None:
        presets = (model_config(preset) for preset in PRESETS)
        num_heads = next((preset.num_heads for preset in presets if preset.hidden_size == width), None)
    if num_heads is None:
        raise WeightsError(
            f"{origin}: width {width} fits no preset and shapes do not tell the number of heads; pass num_heads=…."
        )
    try:
        return config.replace(num_heads=num_heads)
    except ConfigError as error:
        raise WeightsError(f"{origin}: num_heads={num_heads} does not fit it ({error}).") from error
