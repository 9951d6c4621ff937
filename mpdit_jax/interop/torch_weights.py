"""Conversion of models from and to published PyTorch weights: `load_torch` and `to_torch`."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import ConfigError, InputError, WeightsError, WeightsWarning
from mpdit_jax.interop.files import choose, describe_misfit, normalize_weights, read_weights
from mpdit_jax.interop.infer import infer_config, is_table
from mpdit_jax.interop.native_files import PUBLISHED, from_native, stored_config
from mpdit_jax.interop.published_names import (
    CLASS_TABLE,
    EVERY_MODEL,
    expected_shapes,
    is_dit,
    is_mpdit,
    position_tables,
    trained_entries,
)
from mpdit_jax.model.config import CONVENTIONS, ModelConfig
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import Parameters, abstract, merge, split
from mpdit_jax.model.presets import PRESETS, preset_config

StateDict = dict[str, np.ndarray]

# REPA's projectors and ema-pytorch's counters, which may have an axis; other counters have none and any name.
_AUXILIARY = re.compile(r"projectors\..+|n_averaged|initted|step")
# Numbers of classes that data sets have: a table with so many rows may lack the row of the null class, and one with a
# row more has it.
_USUAL_CLASSES = (10, 100, 1000)


def load_torch(
    source: str | Path | Mapping[str, Any],
    num_heads: int | None = None,
    convention: str | None = None,
    *,
    num_classes: int | None = None,
    key: str | None = None,
) -> MPDiT:
    """Load a model from published PyTorch weights of an MPDiT, DiT or SiT, or from a file of `mpdit_jax.convert`.

    The learned variance of a DiT or SiT is dropped.

    Args:
        source: path of a `.safetensors`, `.pt` or `.pth` (read weights-only), or a mapping from the published names to
            arrays.
        num_heads: number of attention heads, which the shapes do not show. Default: that of the presets of the same
            kind and width. A wrong number is not detected.
        convention: convention of the output: "velocity", "dit" or "sit", recorded as `model.config.convention`. For an
            MPDiT it is "velocity". For a DiT or SiT it must be given, because their files look alike; convert the model
            with `as_velocity` to sample from it. A file of `mpdit_jax.convert` records heads and convention itself.
        num_classes: number of classes. Default: one less than the rows of the class table, the last of which is that of
            the null class. With as many classes as rows, the model has no null class (`model.config.null_class`) and
            guidance by it is refused.
        key: selects one of several state dicts, by their name in a PyTorch file or by the part before a dot in the
            entries' names. Default: the moving average, such as "ema" or "model_ema", else the raw weights.

    Raises:
        WeightsError: the file cannot be read; entries are missing, extra or misshapen (the message names all of them);
            the convention is unknown or missing; several state dicts may be meant; or an argument contradicts the file.
        MissingExtraError: a PyTorch file, and PyTorch is not installed.

    A WeightsWarning says which of several state dicts is taken, which entries are left out, and that the last row of a
    class table with an unusual number of rows is taken for the null class.
    """
    return load_with_metadata(source, num_heads, convention, num_classes, key)[0]


def load_with_metadata(
    source: str | Path | Mapping[str, Any],
    num_heads: int | None = None,
    convention: str | None = None,
    num_classes: int | None = None,
    key: str | None = None,
) -> tuple[MPDiT, Mapping[str, str]]:
    """Load a model as `load_torch` does; return also the metadata of our own file (see `native_files`), else {}."""
    if convention not in (None, *CONVENTIONS):
        raise WeightsError(f"convention={convention!r}: expected one of {', '.join(CONVENTIONS)}.")
    if isinstance(source, Mapping):
        origin, weights = "state dict", normalize_weights(source, "state dict", key)
    else:
        origin, weights = str(source), read_weights(source, key)
    config = stored_config(weights.metadata, origin)
    if config is None:
        state = _network(weights.arrays, weights.key, origin)
        return _from_published(*_infer(state, num_heads, convention, num_classes, origin)), {}
    choose([""], weights.key, origin)  # our own files have one state dict
    check_agreement(config, num_heads, convention, origin, num_classes)
    if weights.metadata.get("names") != PUBLISHED:
        return from_native(weights.arrays, config, origin), weights.metadata
    _check_entries(weights.arrays, config, origin)
    return _from_published(weights.arrays, config), weights.metadata


def check_agreement(
    config: ModelConfig, num_heads: int | None, convention: str | None, origin: str, num_classes: int | None = None
) -> None:
    """Raise WeightsError if requested heads, convention or classes differ from those recorded in a file or run."""
    for name, requested in (("num_heads", num_heads), ("convention", convention), ("num_classes", num_classes)):
        recorded = vars(config)[name]
        if requested is not None and requested != recorded:
            raise WeightsError(f"{name}={requested!r}: {origin} records {recorded!r}; leave {name} out.")


def to_torch(model: MPDiT) -> StateDict:
    """Convert the model's weights to the published PyTorch names, as float32 numpy arrays.

    `load_torch` restores the model; it needs `num_heads` unless a preset has them, `convention` for a DiT or SiT, and
    `num_classes` for a model without a null class, whose class table has no row for it.
    The weights of a loaded state dict are returned bit for bit. Its position tables are recomputed, which may change
    their rounding. The learned variance of a DiT or SiT is lost, so PyTorch code must set `learn_sigma=False`.

    Raises:
        ConfigError: there are no published names for this kind of model (`trained_entries`).
        InputError: `model` is not an MPDiT.
    """
    if not isinstance(model, MPDiT):
        raise InputError(f"model={type(model).__name__}: expected a model from load_torch or create_model itself.")
    parameters = {path: np.asarray(array) for path, array in split(model)[1].items()}
    state: StateDict = dict(position_tables(model.config))
    for entry in trained_entries(model.config):
        array = parameters[entry.path]
        if entry.name == CLASS_TABLE:
            array = array[: entry.layout.torch_shape[0]]  # without the untrained row of a model without a null class
        state[entry.name] = entry.layout.to_torch(array if entry.layer is None else array[entry.layer])
    return state


def _network(state: StateDict, key: str | None, origin: str) -> StateDict:
    """Return the entries of one network, without its owner's prefix and without known auxiliary entries."""
    prefixes = dict.fromkeys(match[1] or "" for name in state if (match := EVERY_MODEL.fullmatch(name)))
    prefix = choose([*prefixes] or [""], key, origin)
    start = f"{prefix}." if prefix else ""
    network = {name.removeprefix(start): array for name, array in state.items() if name.startswith(start)}
    network = {name: array for name, array in network.items() if not _is_auxiliary(name, array)}
    left_out = [name for name in state if not name.startswith(start) or name.removeprefix(start) not in network]
    if left_out:
        more = f" and {len(left_out) - 1} more entries" if len(left_out) > 1 else ""
        text = f"{origin}: {left_out[0]}{more} left out, because the model has no such entry."
        warnings.warn(text, WeightsWarning, stacklevel=3)
    return network


def _is_auxiliary(name: str, array: np.ndarray) -> bool:
    """Return whether an entry belongs to no network. A weight or bias of one value does, and is reported as damaged."""
    return _AUXILIARY.fullmatch(name) is not None or (array.ndim == 0 and not name.endswith((".weight", ".bias")))


def _infer(
    state: StateDict, num_heads: int | None, convention: str | None, num_classes: int | None, origin: str
) -> tuple[StateDict, ModelConfig]:
    """Return the entries without a learned variance, and the config that entries and arguments imply."""
    convention = _check_convention(state, convention, origin)
    state = _without_variance(state)
    config = infer_config(state, origin, null_class=_check_classes(state, num_classes, origin))
    _check_entries(state, config, origin)
    return state, _with_heads(config.replace(convention=convention), num_heads, origin)


def _from_published(state: StateDict, config: ModelConfig) -> MPDiT:
    structure, shapes = abstract(config)
    parameters: Parameters = {}
    layers: dict[str, list[np.ndarray]] = {}
    for entry in trained_entries(config):
        array = entry.layout.to_jax(state[entry.name])
        if entry.name == CLASS_TABLE:
            array = np.pad(array, ((0, int(not config.null_class)), (0, 0)))  # a row that nothing may use
        if entry.layer is None:
            parameters[entry.path] = jnp.asarray(array)
        else:
            layers.setdefault(entry.path, []).append(array)
    parameters.update({path: jnp.asarray(np.stack(arrays)) for path, arrays in layers.items()})
    return merge(structure, {path: parameters[path] for path in shapes})


def _check_entries(state: StateDict, config: ModelConfig, origin: str) -> None:
    """Raise WeightsError unless the entries are exactly the config's, finite, with its position tables."""
    found = [(name, state[name], table) for name, table in position_tables(config) if name in state]
    wrong = [name for name, array, table in found if array.shape == table.shape and not is_table(array, table)]
    listed = describe_misfit(state, expected_shapes(config), {"not the fixed sin-cos position table": wrong})
    if listed:
        fits = "fits no MPDiT and no DiT"
        if is_dit(state) or is_mpdit(state):
            fits = f"does not fit the model it describes (depths {config.depths}, width {config.hidden_size})"
        raise WeightsError(
            f"{origin} {fits}: {listed}. Expected the published {'DiT' if is_dit(state) else 'MPDiT'} names; this has "
            f"{_summarize(state)}."
        )


def _check_classes(state: StateDict, num_classes: int | None, origin: str) -> bool:
    """Return whether the class table has a row for the null class. Raise WeightsError if only the caller can tell."""
    table = state.get(CLASS_TABLE, np.zeros(0))
    rows = len(table) if table.ndim == 2 else 0
    flag = " (convert: --num_classes)"
    if num_classes is None and rows in _USUAL_CLASSES:
        raise WeightsError(
            f"{origin} has {rows} rows in its class table, perhaps without a null class: give num_classes={rows} if it "
            f"was trained without label dropout, or {rows - 1} if the last row is the null class{flag}."
        )
    if num_classes is None and rows > 1 and rows - 1 not in _USUAL_CLASSES:
        text = (
            f"{origin} has {rows} rows in its class table: its last row is taken for the null class. If it was trained "
            f"without label dropout, give num_classes={rows}; {rows - 1} confirms the null class{flag}."
        )
        warnings.warn(text, WeightsWarning, stacklevel=4)
    if num_classes is not None and rows and num_classes not in (rows, rows - 1):
        raise WeightsError(
            f"num_classes={num_classes}: {origin} has {rows} rows in its class table; expected {rows - 1}, or {rows} "
            "if there is no null class."
        )
    return num_classes is None or num_classes != rows


def _check_convention(state: StateDict, convention: str | None, origin: str) -> str:
    """Return the convention: the requested one for a DiT's names, "velocity" for an MPDiT's."""
    if is_dit(state):
        if convention is None:
            raise WeightsError(
                f"{origin} may be a DiT, a SiT or a velocity model of their shape, which the names do not show: say "
                "which by convention='dit', 'sit' or 'velocity'."
            )
        return convention
    if convention in ("dit", "sit"):
        names = "an MPDiT's names, which is a velocity" if is_mpdit(state) else _summarize(state)
        raise WeightsError(
            f"convention={convention!r}: {origin} has {names}; expected a DiT's names (blocks.0.attn.qkv.weight)."
        )
    return "velocity"


def _without_variance(state: StateDict) -> StateDict:
    """Return the entries without the learned variance of a DiT or SiT, if the final layer has one."""
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
    # Features are (row, column, channel); the second half of the channels is the variance.
    return state | {
        name: final.reshape(patch**2, 2, channels, *final.shape[1:])[:, 0].reshape(half, *final.shape[1:])
        for name, final in finals.items()
        if final.shape[0] == whole
    }


def _summarize(state: StateDict) -> str:
    return f"{len(state)} entries, such as {', '.join(list(state)[:3]) or 'none'}"


def _with_heads(config: ModelConfig, num_heads: int | None, origin: str) -> ModelConfig:
    """Return the config with the given heads, or with those of the presets of the same kind and width."""
    width, kind = config.hidden_size, (config.condition, config.modulation)
    if num_heads is None:
        presets = (preset_config(preset) for preset in PRESETS)
        known = {(preset.condition, preset.modulation, preset.hidden_size): preset.num_heads for preset in presets}
        num_heads = known.get((*kind, width))
    if num_heads is None:
        raise WeightsError(
            f"{origin}: width {width} fits no preset and shapes do not show the number of heads; pass num_heads=…."
        )
    try:
        return config.replace(num_heads=num_heads)
    except ConfigError as error:
        raise WeightsError(f"{origin}: num_heads={num_heads} does not fit it ({error}).") from error
