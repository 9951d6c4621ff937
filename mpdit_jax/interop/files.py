"""Weights files to plain numpy arrays, executing nothing."""

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
from mpdit_jax.interop.pickles import refusal

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
        arrays: float32, by name.
        metadata: what a file of this project says of itself; of others, anything or nothing.
    """

    arrays: dict[str, np.ndarray]
    metadata: Mapping[str, str]


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of `read_weights`."""
    return read_weights(path).arrays


def read_weights(path: str | Path) -> Weights:
    """The tensors of a `.safetensors`, or of a PyTorch file read weights-only, as float32 numpy arrays.

    A PyTorch file may hold the state dict itself or keep it under "ema" (preferred), "model" or "state_dict".

    Raises:
        WeightsError: no such file, unknown type, damaged, or a pickle that carries more than tensors.
        MissingExtraError: a PyTorch file without PyTorch installed.
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
    """Arrays or tensors by name, as numpy: numbers become float32.

    The prefixes `module.` of DataParallel and `_orig_mod.` of torch.compile go.
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
        # bfloat16 comes as a type that numpy itself does not list as floating.
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise WeightsError(f"{source}: entry {name!r} has dtype {array.dtype}; expected numbers.")
        arrays[_WRAPPERS.sub("", name)] = array.astype(np.float32)
    return arrays


def _read_torch(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is a PyTorch file: {install_extra('torch')}, or convert it to .safetensors."
        ) from error
    try:
        # Trainers store their arguments beside the weights; a Namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is told by our own error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no PyTorch file fail its reader in any way they like
        raise refusal(path, error) from error
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
    # numpy has no bfloat16 of its own, so widening happens on PyTorch's side.
    if not (hasattr(tensor, "is_floating_point") and tensor.is_floating_point()):
        return tensor
    try:
        return tensor.detach().float().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = "a meta tensor" if tensor.is_meta else f"a tensor of layout {tensor.layout}"
        raise WeightsError(f"{path}: entry {name!r} is {kind}; expected a dense one with values.") from error
