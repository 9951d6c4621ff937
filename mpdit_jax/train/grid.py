"""The grid of samples that a run draws every `config.sample.every` steps."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import FrozenConfigDict

from mpdit_jax.data.sources import Source, unseen_classes
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.flow.sampler import make_sampler
from mpdit_jax.io import pictures as images
from mpdit_jax.model.parameters import Parameters, Structure, merge
from mpdit_jax.sample.decoding import Decode, make_decode
from mpdit_jax.vae import PIXELS


def choose_decode(config: FrozenConfigDict, workdir: Path, source: Source) -> Decode | None:
    """Return the decoder of grids and evaluations; None for images, and for latents without `config.sample.vae`."""
    pixels = source.latents is not None and source.latents.vae_fingerprint == PIXELS
    return make_decode(str(workdir), config.sample.vae) if config.sample.vae or pixels else None


def why_no_grid(config: FrozenConfigDict, decode: Decode | None) -> str:
    """Say why grids that the config asks for cannot be drawn; "" if they can."""
    if not config.sample.every or decode is not None:
        return ""
    if config.data.name == "latents":
        return (
            f"config.sample.every={config.sample.every} draws no grids of latents without their VAE: give "
            "--config.sample.vae=FOLDER, now or when the run continues, or --config.sample.every=0"
        )
    if config.model.in_channels not in (1, 3):
        return (
            f"config.sample.every={config.sample.every} draws no grids: these images have {config.model.in_channels} "
            "channels, and a picture has 1 or 3"
        )
    return ""


def guidance(config: FrozenConfigDict) -> float:
    """Return the guidance scale of grids: 1 for a run without label dropout, whose null class is not trained."""
    return float(config.sample.guidance_scale) if config.model.null_class else 1.0


def grid_classes(source: Source, num_classes: int, most: int = 10) -> np.ndarray:
    """Return the first `most` classes that have examples, int (n,)."""
    return np.setdiff1d(np.arange(num_classes), unseen_classes(source.labels, num_classes))[:most]


def draw_grid(
    config: FrozenConfigDict,
    structure: Structure,
    decode: Decode | None,
    classes: np.ndarray,
    ema_parameters: Parameters,
    stopped: Callable[[], bool],
) -> np.ndarray | None:
    """Draw samples, one row for each of `classes`, from the same noise every time; uint8 (H, W, 1 or 3).

    Collective. None for latents that nothing decodes, if `stopped` while they are decoded, and on every process but
    process 0.
    """
    if why_no_grid(config, decode):
        return None
    mesh = jax.sharding.get_mesh()
    if jax.process_count() > 1:
        ema_parameters = multihost_utils.process_allgather(ema_parameters, tiled=True)
        if jax.process_index() > 0:
            return None
        mesh = make_mesh(devices=jax.local_devices()[:1])
    per_class = config.sample.per_class
    sampler = make_sampler(config.sample.solver, config.sample.steps, guidance(config))
    with jax.set_mesh(mesh):
        labels = np.repeat(classes, per_class)
        pictures = np.asarray(sampler(merge(structure, ema_parameters), labels, seed_key(config.seed)))
    if decode is not None:
        rows = []
        for row in np.split(pictures, len(classes)):  # a VAE takes far more memory than the model
            if stopped():
                return None
            rows.append(np.asarray(decode(jnp.asarray(row))))
        pictures = np.concatenate(rows)
    # Values that are not finite are shown as black: the guard judges divergence, and a grid must not end the run.
    return images.grid(images.to_uint8(np.where(np.isfinite(pictures), pictures, -1)), per_class)
