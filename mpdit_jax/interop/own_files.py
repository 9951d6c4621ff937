"""One model as one `.safetensors`: parameters under this project's names, the model's config in the metadata."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from mpdit_jax.errors import ConfigError, WeightsError
from mpdit_jax.files import replacing
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import abstract, merge, split

FORMAT = "mpdit_jax"


def save_own(path: str | Path, model: MPDiT, step: int) -> None:
    """Write the model's parameters and config, and the step of training they are from, by another name first."""
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in split(model)[1].items()}
    metadata = {"format": FORMAT, "model": json.dumps(dataclasses.asdict(model.config)), "step": str(step)}
    with replacing(path) as file:
        file.write(safetensors.numpy.save(arrays, metadata))


def own_step(path: str | Path) -> int | None:
    """The step of training that a file of ours is from; None for a file of another kind."""
    metadata = _metadata(Path(path))
    return int(metadata["step"]) if metadata is not None and metadata.get("step", "").isdigit() else None


def load_own(path: str | Path) -> MPDiT | None:
    """The model of a file that `save_own` wrote; None for a file of another kind, or none.

    Raises:
        WeightsError: one of ours that is damaged, or of a version with other parameters.
    """
    path = Path(path)
    metadata = _metadata(path)
    if metadata is None:
        return None
    try:
        config = ModelConfig().replace(**json.loads(metadata["model"]))
    except (KeyError, TypeError, json.JSONDecodeError, ConfigError) as error:
        raise WeightsError(f"{path}: its metadata hold no model config of this version ({error}).") from error
    structure, shapes = abstract(config)
    try:
        arrays = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file ({error}); write it again.") from error
    wrong = [name for name, leaf in shapes.items() if name not in arrays or arrays[name].shape != leaf.shape]
    wrong += [name for name in arrays if name not in shapes]
    wrong += [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if wrong:
        raise WeightsError(f"{path}: missing, extra, misshapen or not finite: {', '.join(dict.fromkeys(wrong))}.")
    return merge(structure, {name: jnp.asarray(arrays[name], jnp.float32) for name in shapes})


def _metadata(path: Path) -> dict[str, str] | None:
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
    except (safetensors.SafetensorError, OSError):
        return None  # who reads the whole file says what is wrong with it
    return metadata if metadata and metadata.get("format") == FORMAT else None
