"""Published PyTorch names and layouts ⇄ our model, from one table in both directions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import ConfigError, WeightsError
from mpdit_jax.interop.files import normalize_state_dict, read_state_dict
from mpdit_jax.interop.infer import find_problems, infer_config, is_table
from mpdit_jax.interop.own_files import load_own
from mpdit_jax.interop.published_names import expected_shapes, is_dit, position_tables, trained_entries
from mpdit_jax.model.config import CONVENTIONS, ModelConfig
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import Parameters, abstract, merge, split
from mpdit_jax.model.presets import PRESETS, model_config

StateDict = dict[str, np.ndarray]


def load_torch(
    source: str | Path | Mapping[str, Any], num_heads: int | None = None, convention: str | None = None
) -> MPDiT:
    """A model with published PyTorch weights: an MPDiT's, or a DiT's or SiT's, whose learned variance is dropped.

    A `.safetensors` that `python -m mpdit_jax.convert` wrote is read as well; its config is inside.

    Args:
        source: path of a `.safetensors`, `.pt` or `.pth` (weights only; the key "ema" is preferred), or a mapping from
            the published names to arrays.
        num_heads: attention heads, which no shape tells; default: those of the presets of this kind (MPDiT's, or DiT's)
            and width. Give them for a model whose heads are not a preset's: nothing in a file would show the mistake.
        convention: what the model predicts: "velocity" (ours), "dit" or "sit"; recorded as `model.config.convention`.
            Default: "velocity" where the names are MPDiT's or no variance is learned; DiT and SiT files look alike,
            and theirs has to be given. `as_velocity(model)` is then what samplers take.

    Raises:
        WeightsError: the file cannot be read, or entries are missing, extra or misshapen; all of them are named. Or the
            convention is not one of these, or needed.
        MissingExtraError: a PyTorch file without PyTorch installed.
    """
    if isinstance(source, Mapping):
        state, origin = normalize_state_dict(source, "state dict"), "state dict"
    elif (own := load_own(source)) is not None:
        return own
    else:
        state, origin = read_state_dict(source), str(source)
    state, convention = _without_variance(state, convention, origin)
    config = infer_config(state, origin)
    _check_entries(state, config, origin)
    config = _with_heads(config.replace(convention=convention), num_heads, origin)
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
    """The model's weights under their published PyTorch names, float32 numpy; the exact inverse of `load_torch`.

    The fixed position tables are computed anew: `load_torch` reads tables that are a rounding off these, and such a
    state dict comes back with ours.

    Raises:
        ConfigError: a model of a kind for which there are no published names (`trained_entries`).
    """
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


def _without_variance(state: StateDict, convention: str | None, origin: str) -> tuple[StateDict, str]:
    """The entries without the learned variance of a published DiT or SiT, and what the model predicts."""
    halves = dict[str, np.ndarray]()
    patches = state.get("x_embedder.proj.weight", np.zeros(0))
    if is_dit(state) and patches.ndim == 4:
        _, channels, patch, _ = patches.shape
        for name, dimensions in (("final_layer.linear.weight", 2), ("final_layer.linear.bias", 1)):
            final = state.get(name, np.zeros(0))
            if final.ndim == dimensions and channels and final.shape[0] == 2 * channels * patch**2:
                # Features are (row, column, channel), and the second half of the channels is the variance.
                half = final.reshape(patch**2, 2, channels, *final.shape[1:])[:, 0]
                halves[name] = half.reshape(-1, *final.shape[1:])
    if convention is None and halves:
        raise WeightsError(
            f"{origin} is a DiT or a SiT, which no name or shape tells apart: say which by convention='dit' or 'sit'."
        )
    if convention not in (None, *CONVENTIONS):
        raise WeightsError(f"convention={convention!r}: expected one of {', '.join(CONVENTIONS)}.")
    if convention in ("dit", "sit") and not is_dit(state):
        raise WeightsError(f"convention={convention!r}: {origin} has an MPDiT's names, which is a velocity.")
    return state | halves, convention or "velocity"


def _with_heads(config: ModelConfig, num_heads: int | None, origin: str) -> ModelConfig:
    """The config with its heads: those given, or those of the presets of this kind and width.

    Depth and patch sizes do not matter: presets of a kind and width share their heads, and so do the paper's ablations.
    """
    width, kind = config.hidden_size, (config.condition, config.modulation)
    if num_heads is None:
        presets = (model_config(preset) for preset in PRESETS)
        known = {(preset.condition, preset.modulation, preset.hidden_size): preset.num_heads for preset in presets}
        num_heads = known.get((*kind, width))
    if num_heads is None:
        raise WeightsError(
            f"{origin}: width {width} fits no preset and shapes do not tell the number of heads; pass num_heads=…."
        )
    try:
        return config.replace(num_heads=num_heads)
    except ConfigError as error:
        raise WeightsError(f"{origin}: num_heads={num_heads} does not fit it ({error}).") from error
