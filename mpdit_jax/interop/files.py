"""Reading of weights files as numpy arrays, without executing anything from them."""

import argparse
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from mpdit_jax.errors import MissingExtraError, WeightsError, WeightsWarning, install_extra
from mpdit_jax.interop.pickles import explain_refusal
from mpdit_jax.io.paths import expand

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
# What DataParallel, torch.compile, FSDP and activation checkpointing insert into names.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_WEIGHTS = "(?:models?|net(?:work)?|unet|weights?|param(?:eter)?s?|state|dict)"
# Words in the name of a moving average; "exp_avg" is an optimizer's.
_AVERAGE = re.compile(
    rf"(?<![a-z])(?:ema|swa|shadow|polyak)(?:{_WEIGHTS}|(?![a-z]))|{_WEIGHTS}(?:ema|swa)(?![a-z])|averag"
    r"|(?<![a-z])(?<!exp_)avg(?![a-z])",
    re.IGNORECASE,
)
# Entries of a checkpoint that hold arrays, and no network.
_NO_NETWORK = re.compile("optim|sched|scaler|rng|random", re.IGNORECASE)


class Weights(NamedTuple):
    """The content of a weights file."""

    arrays: dict[str, np.ndarray]  # float32 arrays by name
    metadata: Mapping[str, str]  # see native_files.py; other projects' files may have other entries or none
    key: str | None = None  # the requested key, unless it was used to select the state dict


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Read the arrays of a weights file; see `read_weights`."""
    return read_weights(path).arrays


def read_weights(path: str | Path, key: str | None = None) -> Weights:
    """Read a `.safetensors` file, or a PyTorch file with weights_only=True, as float32 numpy arrays.

    A PyTorch file may be a state dict or hold several; see `normalize_weights` for the choice and `key`.

    Raises:
        WeightsError: the file is missing, damaged or of unknown type, its pickle holds more than tensors, or it has
            several state dicts and none of them is clearly the one to use.
        MissingExtraError: PyTorch is needed and not installed.
    """
    path = expand(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected a .safetensors or a PyTorch .pt/.pth file.")
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
            return Weights(normalize_state_dict(safetensors.numpy.load_file(path), str(path)), metadata, key)
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path} is not a readable safetensors file ({error}); download it again.") from error
    if path.suffix in TORCH_FILES:
        return normalize_weights(_read_torch(path), str(path), key)
    raise WeightsError(f"{path}: unknown type {path.suffix!r}; expected .safetensors or {', '.join(TORCH_FILES)}.")


def normalize_weights(content: Mapping[str, Any], source: str, key: str | None = None) -> Weights:
    """Convert a state dict, or the one to use of a checkpoint with several, to float32 numpy arrays.

    Of several, `key` selects one; without it, the moving average (a key such as "ema" or "model_ema") is taken, and
    otherwise "model" or "state_dict". A state dict may be nested once more, as in {"ema": {"shadow": …}}. A
    WeightsWarning names a choice that is not obvious.
    """
    held = _state_dicts(content)
    if not held:
        return Weights(normalize_state_dict(content, source), {}, key)
    metadata = content["metadata"] if isinstance(content.get("metadata"), Mapping) else {}
    rest = None if key in held else key  # a key that names no state dict is a prefix of entry names
    having = [name for name in held if rest and any(str(entry).startswith(f"{rest}.") for entry in held[name])]
    chosen = choose(having or [*held], None if having else key, source)
    for name, value in content.items():
        empty = value is None or (
            isinstance(value, Mapping | list | tuple) and not {name, *_inner(name, value)} & {*held}
        )
        if key is None and empty and _is_average(name) and not _is_average(chosen):
            text = f"{source}: {name!r} holds no state dict; {chosen!r} is taken, which is no moving average."
            warnings.warn(text, WeightsWarning, stacklevel=2)
    return Weights(normalize_state_dict(held[chosen], source), metadata, rest)


def choose(names: Sequence[str], key: str | None, source: str) -> str:
    """Return the name of the state dict to use: `key` if given, else the moving average, else the raw weights.

    Raise WeightsError if there is none of that name, or if the names do not decide.
    """
    if key is not None:
        if key not in names:
            known = ", ".join(filter(None, names)) or "one, without a name"
            raise WeightsError(f"key={key!r}: {source} has no such state dict; it has {known}.")
        return key
    averages = [name for name in names if _is_average(name)]
    usual = ([name for name in names if name.rpartition(".")[2] == word] for word in ("", "model", "state_dict"))
    found = averages or next((same for same in usual if same), [*names])
    if len(found) > 1:
        kind = "moving averages" if averages else "state dicts"
        raise WeightsError(
            f"{source} has several {kind} ({', '.join(found)}): choose one by key, such as key={found[0]!r} (convert: "
            f"--key={found[0]})."
        )
    others = ", ".join(repr(name) for name in names if name != found[0])
    instead = f"; key=… (convert: --key) selects another: {others}" if others else ""
    if averages and found != ["ema"]:
        warnings.warn(f"{source}: the moving average {found[0]!r} is taken{instead}.", WeightsWarning, stacklevel=2)
    elif others and not averages:
        taken = f"{found[0]!r} is taken" if found[0] else "the entries without a prefix are taken"
        text = f"{source}: {taken}, by its name no moving average{instead}."
        warnings.warn(text, WeightsWarning, stacklevel=2)
    return found[0]


def normalize_state_dict(mapping: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
    """Convert arrays or tensors by name to float32 numpy arrays; parts of names from PyTorch's wrappers are removed."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise WeightsError(f"{source}: key {name!r} is not a name; expected a mapping from names to arrays.")
        array = _to_array(name, value, source)
        # To numpy, bfloat16 is not of a floating kind.
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise WeightsError(f"{source}: entry {name!r} has dtype {array.dtype}; expected numbers.")
        plain = _WRAPPERS.sub("", name)
        if plain in arrays:
            raise WeightsError(f"{source}: {plain!r} is there twice, once as {name!r}; give the file of one network.")
        arrays[plain] = array.astype(np.float32)
    return arrays


def compare_shapes(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Compare arrays with expected shapes by name; return lists of the "missing", the "extra" and the "misshapen"."""
    return {
        "missing": [name for name in shapes if name not in arrays],
        "extra": [name for name in arrays if name not in shapes],
        "misshapen": [
            f"{name} is {arrays[name].shape} instead of {shape}"
            for name, shape in shapes.items()
            if name in arrays and arrays[name].shape != shape
        ],
    }


def describe_misfit(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    more: Mapping[str, list[str]] | None = None,
) -> str:
    """List in words what is missing, extra, misshapen, not finite or, by kind, in `more`; "" if everything fits."""
    problems = compare_shapes(arrays, shapes)
    problems["not finite"] = [name for name in shapes if name in arrays and not np.isfinite(arrays[name]).all()]
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in (problems | dict(more or {})).items() if names)


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is a PyTorch file: {install_extra('torch')}, or convert it to .safetensors."
        ) from error
    try:
        # Training scripts store their arguments beside the weights, and a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # errors are reported below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes can raise any exception
        raise explain_refusal(path, error) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}; expected a state dict (names to tensors).")
    return content


def _state_dicts(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the state dicts by name. Several in one entry have the name of the entry, a dot and their own."""
    held: dict[str, Mapping[str, Any]] = {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping) and not _NO_NETWORK.search(name):
            inner = {} if _has_weights(value) else _inner(name, value)
            if len(inner) > 1 or (inner and _is_average(next(iter(inner))) and not _is_average(name)):
                held |= inner
            elif inner or _has_weights(value):
                held[name] = next(iter(inner.values()), value)
    return held


def _inner(name: str, value: Any) -> dict[str, Mapping[str, Any]]:
    """Return the state dicts in the entry `name`, such as "shadow" in {"decay": 0.99, "shadow": …}."""
    inner = value.items() if isinstance(value, Mapping) else ()
    return {f"{name}.{key}": part for key, part in inner if isinstance(part, Mapping) and _has_weights(part)}


def _has_weights(value: Mapping[str, Any]) -> bool:
    return any(_is_array(entry) and len(entry.shape) > 0 for entry in value.values())


def _is_average(name: object) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", str(name))  # emaModel, EMAModel
    return _AVERAGE.search(words) is not None


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _to_array(name: str, value: Any, source: str) -> np.ndarray:
    if _is_array(value) and hasattr(value, "is_floating_point") and value.is_floating_point():
        try:
            value = value.detach().float().numpy()  # float() first, because numpy has no bfloat16
        except (TypeError, ValueError, RuntimeError) as error:
            kind = "a meta tensor" if value.is_meta else f"a tensor of layout {value.layout}"
            raise WeightsError(f"{source}: entry {name!r} is {kind}; expected a dense tensor with values.") from error
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{source}: entry {name!r} is {type(value).__name__}, not an array ({error}).") from error
