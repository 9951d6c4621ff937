"""What our files say of themselves, and one model as one `.safetensors` with parameters under this project's names.

The metadata are texts: "format", "model" (the config as JSON), "step" of training, and "names" where these are the
published ones. A `.safetensors` has them in its header, a PyTorch file beside its weights.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from mpdit_jax.errors import ConfigError, WeightsError
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.model.config import ModelConfig, without_idle
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import abstract, merge, split

FORMAT = "mpdit_jax"
PUBLISHED = "published"


def metadata_of(model: MPDiT, step: int) -> dict[str, str]:
    """What a file of the model says, as of a step of training."""
    return {"format": FORMAT, "model": json.dumps(dataclasses.asdict(model.config)), "step": str(step)}


def stored_config(metadata: Mapping[str, str], origin: str) -> ModelConfig | None:
    """The model's config that a file of ours has; None for a file of another kind.

    Raises:
        WeightsError: none there, or of a version with other fields.
    """
    if metadata.get("format") != FORMAT:
        return None
    try:
        return ModelConfig().replace(**without_idle(parse_json(metadata["model"])))
    except (KeyError, TypeError, AttributeError, ConfigError, ValueError) as error:
        raise WeightsError(f"{origin}: its metadata hold no model config of this version ({error}).") from error


def stored_step(metadata: Mapping[str, str]) -> int | None:
    """The step of training that a file of ours is from; None where it does not say."""
    step = metadata.get("step", "")
    return int(step) if isinstance(step, str) and re.fullmatch(r"[0-9]{1,9}", step) else None


def save_own(path: str | Path, model: MPDiT, step: int) -> None:
    """Write the model's parameters and metadata, by another name first."""
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in split(model)[1].items()}
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save(arrays, metadata_of(model, step)))


def from_own(arrays: Mapping[str, np.ndarray], config: ModelConfig, origin: str) -> MPDiT:
    """The model of that config with these parameters, by this project's names.

    Raises:
        WeightsError: they are not that config's.
    """
    structure, shapes = abstract(config)
    wrong = [name for name, leaf in shapes.items() if name not in arrays or arrays[name].shape != leaf.shape]
    wrong += [name for name in arrays if name not in shapes]
    wrong += [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if wrong:
        raise WeightsError(f"{origin}: missing, extra, misshapen or not finite: {', '.join(dict.fromkeys(wrong))}.")
    return merge(structure, {name: jnp.asarray(arrays[name]) for name in shapes})
