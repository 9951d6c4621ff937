"""Reading of weights files as numpy arrays, without executing anything from them."""

import argparse
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from mpdit_jax.errors import MissingExtraError, WeightsError, install_extra
from mpdit_jax.interop.pickles import explain_refusal

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")


class Weights(NamedTuple):
    """The content of a weights file."""

    arrays: dict[str, np.ndarray]  # float32 arrays by name
    metadata: Mapping[str, str]  # see native_files.py; other projects' files may have other entries or none


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Read the arrays of a weights file; see `read_weights`."""
    return read_weights(path).arrays


def read_weights(path: str | Path) -> Weights:
    """Read a `.safetensors` file, or a PyTorch file with weights_only=True, as float32 numpy arrays.

    A PyTorch file may be a state dict or have one under "ema" (preferred), "model" or "state_dict".

    Raises:
        WeightsError: the file is missing, damaged or of unknown type, or its pickle holds more than tensors.
        MissingExtraError: PyTorch is needed and not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected a .safetensors or a PyTorch .pt/.pth file.")
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
            return Weights(normalize_state_dict(safetensors.numpy.load_file(path), str(path)), metadata)
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path} is not a readable safetensors file ({error}); download it again.") from error
    if path.suffix in _TORCH_SUFFIXES:
        state, metadata = _read_torch(path)
        return Weights(normalize_state_dict(state, str(path)), metadata)
    raise WeightsError(f"{path}: unknown type {path.suffix!r}; expected .safetensors or {', '.join(_TORCH_SUFFIXES)}.")


def normalize_state_dict(mapping: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
    """Convert arrays or tensors by name to float32 numpy arrays.

    The prefixes `module.` (DataParallel) and `_orig_mod.` (torch.compile) are removed from the names.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise WeightsError(f"{source}: key {name!r} is not a name; expected a mapping from names to arrays.")
        try:
            array = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise WeightsError(
                f"{source}: entry {name!r} is {type(value).__name__}, not an array ({error})."
            ) from error
        # To numpy, bfloat16 is not of a floating kind.
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise WeightsError(f"{source}: entry {name!r} has dtype {array.dtype}; expected numbers.")
        arrays[_WRAPPERS.sub("", name)] = array.astype(np.float32)
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


def _read_torch(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
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
    metadata: Mapping[str, str] = {}
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            if isinstance(content.get("metadata"), Mapping):
                metadata = content["metadata"]
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}; expected a state dict (names to tensors).")
    return {name: _to_float32(name, value, path) for name, value in content.items()}, metadata


def _to_float32(name: object, tensor: Any, path: Path) -> Any:
    if not (hasattr(tensor, "is_floating_point") and tensor.is_floating_point()):
        return tensor
    try:
        return tensor.detach().float().numpy()  # float() first, because numpy has no bfloat16
    except (TypeError, ValueError, RuntimeError) as error:
        kind = "a meta tensor" if tensor.is_meta else f"a tensor of layout {tensor.layout}"
        raise WeightsError(f"{path}: entry {name!r} is {kind}; expected a dense tensor with values.") from error
