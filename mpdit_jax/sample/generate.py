"""`mpdit_jax.generate` draws pictures in one call, for notebooks."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from PIL import Image

from mpdit_jax.checkpoint.load import load_checkpoint, load_config
from mpdit_jax.errors import InputError
from mpdit_jax.flow.inputs import check_model, check_scale
from mpdit_jax.flow.sampler import make_sampler
from mpdit_jax.io import pictures as images
from mpdit_jax.sample.classes import Classes, read_classes
from mpdit_jax.sample.decoding import make_decode
from mpdit_jax.sample.drawing import Decode, Drawing, check_drawable
from mpdit_jax.validation import check_seed, is_whole


def generate(
    workdir_or_model: str | Path | nnx.Module,
    labels: int | str | Sequence[int | str] | np.ndarray,
    *,
    seed: int = 0,
    solver: Any = "euler",
    steps: int = 250,
    guidance_scale: Any = 1.0,
    batch_size: int = 64,
    step: int | None = None,
    ema: bool = True,
    vae: str | Path | None = None,
    decode: Decode | None = None,
    negative_labels: Any = None,
    guide: nnx.Module | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Draw one picture for each label.

    Args:
        workdir_or_model: the folder of a run, or a model.
        labels: one class or several, by index or as the command's `--labels`: "0-3", "null", and by name, such as
            "cat", where the folder of a run knows the names.
        seed: picture i depends only on (seed, i, labels[i]) and the settings.
        solver: see `make_sampler`.
        steps: velocity evaluations.
        guidance_scale: one number, or one for each label.
        batch_size: pictures at a time.
        step: which checkpoint of a workdir; default the newest.
        ema: use the moving average of a workdir's parameters, else the raw parameters.
        vae: folder or hub name of the VAE of a run on latents.
        decode: maps latents (n, h, w, c) to pictures (n, H, W, 1 or 3) in [-1, 1], in place of `vae`.
        negative_labels: classes to guide away from: one for all, one for each label, or `{class: negative}`.
        guide: a weaker model to guide away from; see the sampler's call.
        **settings: more of `make_sampler`: guidance_interval, time_grid, precision, the solver's options.

    Returns:
        PIL images, greyscale or RGB, in the order of the labels. A picture with NaN or Inf is white, with a warning.

    Raises:
        CheckpointError: no run or checkpoint.
        ConfigError, InputError: bad settings or labels, or a run on latents without their VAE.
    """
    if vae is not None and (decode is not None or not isinstance(workdir_or_model, str | Path)):
        raise InputError(
            f"vae={vae}: it belongs to the folder of a run, with no decode; give decode alone for a model."
        )
    if isinstance(workdir_or_model, str | Path):
        model: nnx.Module = load_checkpoint(workdir_or_model, step, ema)
        if decode is None:
            decode = make_decode(str(workdir_or_model), None if vae is None else str(vae), argument="vae")
        classes = read_classes(workdir_or_model, load_config(workdir_or_model))
    else:
        model = workdir_or_model
        classes = Classes(tuple(f"class {label}" for label in range(check_model(model).num_classes)))
    values = classes.find(labels, "labels")
    check_drawable(check_model(model).input_shape, decode)
    if not is_whole(batch_size) or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r}: expected a whole number of images, 1 or more.")
    check_seed(seed, "seed")
    sampler = make_sampler(solver, steps, check_scale(guidance_scale, len(values)), **settings)
    scale = np.asarray(sampler.guidance_scale)
    if isinstance(negative_labels, Mapping):
        negative_labels = classes.find_pairs(negative_labels, "negative_labels")
    elif negative_labels is not None:
        negatives = classes.find(negative_labels, "negative_labels")
        if len(negatives) not in (1, len(values)):
            raise InputError(f"{len(negatives)} negative labels for {len(values)} labels: expected one for each.")
        negative_labels = np.resize(negatives, len(values))
    call = {"guidance_scale": scale if scale.ndim else None, "negative_labels": negative_labels, "guide": guide}
    drawing = Drawing(sampler, model, values, seed, batch_size, decode, call)
    pictures: list[Image.Image] = []
    for start in range(0, len(values), batch_size):
        block = drawing.draw(np.arange(start, min(start + batch_size, len(values))))
        for index in block.indices[~block.finite]:
            warnings.warn(f"picture {index} (label {values[index]}) holds NaN or Inf and is left white.", stacklevel=2)
        pictures.extend(images.to_pil(image) for image in block.images)
    return pictures
