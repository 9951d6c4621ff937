"""Weights files to plain numpy arrays, executing nothing."""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mpdit_jax.errors import MissingExtraError, WeightsError

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
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
            return normalize_state_dict(safetensors.numpy.load_file(path), str(path))
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path} is not a readable safetensors file ({error}); download it again.") from error
    if path.suffix in _TORCH_SUFFIXES:
        return normalize_state_dict(_read_torch(path), str(path))
    raise WeightsError(f"{path}: unknown type {path.suffix!r}; expected .safetensors or {', '.join(_TORCH_SUFFIXES)}.")


def normalize_state_dict(mapping: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
    """Arrays or tensors by name, as numpy: numbers become float32, a DataParallel `module.` prefix goes."""
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
        arrays[name.removeprefix("module.")] = array.astype(np.float32)
    return arrays


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is a PyTorch file: install the extra with `pip install 'mpdit_jax[torch]'`, "
            "or convert it to .safetensors."
        ) from error
    try:
        # Trainers store their arguments beside the weights; a Namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise WeightsError(
            f"{path} holds more than tensors{what} and was not loaded, since it could run code: where you trust it, "
            "save its weights alone, as in torch.save(checkpoint['ema'], 'weights.pt')."
        ) from error
    except Exception as error:  # bytes that are no PyTorch file fail its reader in any way they like
        raise WeightsError(f"{path} is not a readable PyTorch file ({error}); download it again.") from error
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}; expected a state dict (names to tensors).")
    return {name: _to_float32(value) for name, value in content.items()}


def _to_float32(tensor: Any) -> Any:
    # numpy has no bfloat16 of its own, so widening happens on PyTorch's side.
    is_floating = hasattr(tensor, "is_floating_point") and tensor.is_floating_point()
    return tensor.detach().float().numpy() if is_floating else tensor
