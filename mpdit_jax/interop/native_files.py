"""This project's weights files: parameters under our own names, and metadata.

The metadata are strings: "format", "model" (the config as JSON), "step" (of training), "data" (the run's data.json with
what decoding needs, if known) and "names" if the file has the published names. A `.safetensors` has them in its header,
a PyTorch file beside its weights.
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
from mpdit_jax.interop.files import describe_misfit
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.model.config import ModelConfig, drop_unused
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import abstract, merge, split

FORMAT = "mpdit_jax"
PUBLISHED = "published"


def build_metadata(model: MPDiT, step: int) -> dict[str, str]:
    """Build the metadata of a file with the model's weights at a training step."""
    return {"format": FORMAT, "model": json.dumps(dataclasses.asdict(model.config)), "step": str(step)}


def stored_config(metadata: Mapping[str, str], origin: str) -> ModelConfig | None:
    """Return the model config in the metadata; None for another project's file.

    Raise WeightsError if the config is missing or has fields that this version does not know.
    """
    if metadata.get("format") != FORMAT:
        return None
    try:
        return ModelConfig().replace(**drop_unused(parse_json(metadata["model"])))
    except (KeyError, TypeError, AttributeError, ConfigError, ValueError) as error:
        raise WeightsError(f"{origin}: its metadata hold no model config of this version ({error}).") from error


def stored_step(metadata: Mapping[str, str]) -> int | None:
    """Return the training step in the metadata, or None."""
    step = metadata.get("step", "")
    return int(step) if isinstance(step, str) and re.fullmatch(r"[0-9]{1,9}", step) else None


def save_native(path: str | Path, model: MPDiT, step: int, more: Mapping[str, str] | None = None) -> None:
    """Write the model's parameters and metadata, and `more` metadata, atomically to a `.safetensors`."""
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in split(model)[1].items()}
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save(arrays, build_metadata(model, step) | dict(more or {})))


def from_native(arrays: Mapping[str, np.ndarray], config: ModelConfig, origin: str) -> MPDiT:
    """Build the model of a config from parameters under our own names. Raise WeightsError if they do not fit it."""
    structure, shapes = abstract(config)
    if listed := describe_misfit(arrays, {name: leaf.shape for name, leaf in shapes.items()}):
        raise WeightsError(f"{origin} does not fit the model in its metadata: {listed}.")
    return merge(structure, {name: jnp.asarray(arrays[name]) for name in shapes})
