"""Published PyTorch names and layouts ⇄ our model, from one table in both directions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import ConfigError, InputError, WeightsError
from mpdit_jax.interop.files import Weights, normalize_state_dict, read_weights
from mpdit_jax.interop.infer import find_problems, infer_config, is_table
from mpdit_jax.interop.native_files import PUBLISHED, from_own, stored_config
from mpdit_jax.interop.published_names import expected_shapes, is_dit, is_mpdit, position_tables, trained_entries
from mpdit_jax.model.config import CONVENTIONS, ModelConfig
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import Parameters, abstract, merge, split
from mpdit_jax.model.presets import PRESETS, preset_config

StateDict = dict[str, np.ndarray]


def load_torch(
    source: str | Path | Mapping[str, Any], num_heads: int | None = None, convention: str | None = None
) -> MPDiT:
    """A model with published PyTorch weights: an MPDiT's, or a DiT's or SiT's, whose learned variance is dropped.

    What `python -m mpdit_jax.convert` wrote is read as well; its config is inside.

    Args:
        source: path of a `.safetensors`, `.pt` or `.pth` (weights only; the key "ema" is preferred), or a mapping from
            the published names to arrays.
        num_heads: attention heads, which no shape tells; default: those of the presets of this kind (MPDiT's, or DiT's)
            and width. Give them for a model whose heads are not a preset's: nothing in a file would show the mistake.
        convention: what the model predicts: "velocity" (ours), "dit" or "sit"; recorded as `model.config.convention`.
            Default: "velocity" where the names are MPDiT's. DiT and SiT files look alike, and like those of a velocity
            in DiT's shape: theirs has to be given, unless `convert` wrote the file. `as_velocity(model)` is then what
            samplers take.

    Raises:
        WeightsError: the file cannot be read, or entries are missing, extra or misshapen; all of them are named. Or the
            convention is not one of these, or needed; or heads or convention contradict what the file says of itself.
        MissingExtraError: a PyTorch file without PyTorch installed.
    """
    return load_with_metadata(source, num_heads, convention)[0]


def load_with_metadata(
    source: str | Path | Mapping[str, Any], num_heads: int | None = None, convention: str | None = None
) -> tuple[MPDiT, Mapping[str, str]]:
    """As `load_torch`, with what a file of this project says of itself (see `own_files`); {} for others."""
    if convention not in (None, *CONVENTIONS):
        raise WeightsError(f"convention={convention!r}: expected one of {', '.join(CONVENTIONS)}.")
    if isinstance(source, Mapping):
        origin, weights = "state dict", Weights(normalize_state_dict(source, "state dict"), {})
    else:
        origin, weights = str(source), read_weights(source)
    config = stored_config(weights.metadata, origin)
    if config is None:
        return _from_published(*_infer(weights.arrays, num_heads, convention, origin)), {}
    check_agreement(config, num_heads, convention, origin)
    if weights.metadata.get("names") != PUBLISHED:
        return from_own(weights.arrays, config, origin), weights.metadata
    _check_entries(weights.arrays, config, origin)
    return _from_published(weights.arrays, config), weights.metadata


def check_agreement(config: ModelConfig, num_heads: int | None, convention: str | None, origin: str) -> None:
    """Raise WeightsError if the heads or convention asked for are not those that a file or run says it has."""
    for name, asked in (("num_heads", num_heads), ("convention", convention)):
        said = vars(config)[name]
        if asked is not None and asked != said:
            raise WeightsError(f"{name}={asked!r}: {origin} says of itself that it is {said!r}; leave {name} out.")


def to_torch(model: MPDiT) -> StateDict:
    """The model's weights under their published PyTorch names, float32 numpy; `load_torch` gives the model back.

    It is given what the names do not tell: heads that are no preset's, and the convention of a DiT's names. The other
    way round, a state dict that was loaded comes back bit for bit, with two exceptions. The fixed position tables are
    computed anew: `load_torch` reads tables that are a rounding off these. And the learned variance of a published DiT
    or SiT is gone: in PyTorch, its code takes the result with `learn_sigma=False` alone.

    Raises:
        ConfigError: a model of a kind for which there are no published names (`trained_entries`).
        InputError: not an MPDiT.
    """
    if not isinstance(model, MPDiT):
        raise InputError(f"model={type(model).__name__}: expected a model from load_torch or create_model itself.")
    parameters = {path: np.asarray(array) for path, array in split(model)[1].items()}
    state: StateDict = dict(position_tables(model.config))
    for entry in trained_entries(model.config):
        array = parameters[entry.path]
        state[entry.name] = entry.layout.to_torch(array if entry.layer is None else array[entry.layer])
    return state


def _infer(
    state: StateDict, num_heads: int | None, convention: str | None, origin: str
) -> tuple[StateDict, ModelConfig]:
    """The entries that are used, and the config that they and the arguments tell."""
    convention = _check_convention(state, convention, origin)
    state = _without_variance(state)
    config = infer_config(state, origin)
    _check_entries(state, config, origin)
    return state, _with_heads(config.replace(convention=convention), num_heads, origin)


def _from_published(state: StateDict, config: ModelConfig) -> MPDiT:
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


def _check_entries(state: StateDict, config: ModelConfig, origin: str) -> None:
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
            f"{'; '.join(found)}. Expected the published {'DiT' if is_dit(state) else 'MPDiT'} names; this has "
            f"{_such_as(state)}."
        )


def _check_convention(state: StateDict, convention: str | None, origin: str) -> str:
    """What the model predicts: what is asked for, or what the names tell."""
    if is_dit(state):
        if convention is None:
            raise WeightsError(
                f"{origin} is a DiT or a SiT, or a velocity in their shape, which no name tells apart: say which by "
                "convention='dit', 'sit' or 'velocity'."
            )
        return convention
    if convention in ("dit", "sit"):
        what = "an MPDiT's names, which is a velocity" if is_mpdit(state) else _such_as(state)
        raise WeightsError(
            f"convention={convention!r}: {origin} has {what}; expected a DiT's names (blocks.0.attn.qkv.weight)."
        )
    return "velocity"


def _without_variance(state: StateDict) -> StateDict:
    """The entries without the learned variance of a published DiT or SiT: of weight and bias both, or of neither."""
    patches = state.get("x_embedder.proj.weight", np.zeros(0))
    if not is_dit(state) or patches.ndim != 4:
        return state
    _, channels, patch, _ = patches.shape
    names = {"final_layer.linear.weight": 2, "final_layer.linear.bias": 1}
    finals = {name: state[name] for name, ndim in names.items() if name in state and state[name].ndim == ndim}
    sizes = {final.shape[0] for final in finals.values()}
    whole, half = 2 * channels * patch**2, channels * patch**2
    if not half or whole not in sizes or half in sizes:
        return state
    # Features are (row, column, channel), and the second half of the channels is the variance.
    return state | {
        name: final.reshape(patch**2, 2, channels, *final.shape[1:])[:, 0].reshape(half, *final.shape[1:])
        for name, final in finals.items()
        if final.shape[0] == whole
    }


def _such_as(state: StateDict) -> str:
    return f"{len(state)} entries, such as {', '.join(list(state)[:3]) or 'none'}"


def _with_heads(config: ModelConfig, num_heads: int | None, origin: str) -> ModelConfig:
    """The config with its heads: those given, or those of the presets of this kind and width.

    Depth and patch sizes do not matter: presets of a kind and width share their heads, and so do the paper's ablations.
    """
    width, kind = config.hidden_size, (config.condition, config.modulation)
    if num_heads is None:
        presets = (preset_config(preset) for preset in PRESETS)
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
