"""A run of many images: blocks shared out over processes and devices, resumed where they ended."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from mpdit_jax.distributed.collectives import barrier
from mpdit_jax.distributed.mesh import batch_sharding, make_mesh
from mpdit_jax.errors import InputError
from mpdit_jax.flow.inputs import check_labels, check_model
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.flow.sampler import Sampler
from mpdit_jax.io import pictures as images
from mpdit_jax.runtime.progress import WorkBar
from mpdit_jax.sample.blocks import Block, BlockFolder

Decode: TypeAlias = Callable[[jax.Array], jax.Array]
"""Latents (n, h, w, c) to images (n, H, W, 1 or 3) in [-1, 1]."""


def draw_blocks(
    sampler: Sampler,
    model: Any,
    labels: np.ndarray,
    seed: int,
    folder: BlockFolder,
    batch_size: int,
    *,
    decode: Decode | None = None,
    each: Callable[[Block], None] = lambda block: None,
    **call: Any,
) -> int:
    """Draw image i for labels[i] and keep it in `folder`, `batch_size` images a block; finished blocks are left alone.

    Block b belongs to process b modulo the number of processes, which draws it on its own devices: nothing crosses
    between processes, and image i does not depend on how many there are.

    Args:
        sampler: what draws.
        model: the model.
        labels: int (N,).
        seed: image i depends on (seed, i, labels[i]) and the settings alone.
        folder: where finished blocks go.
        batch_size: images a block.
        decode: from latents to pictures; none for a model of pictures.
        each: called with every block this process draws, before it counts as finished.
        **call: more arguments of the sampler's call.

    Returns:
        The number of blocks of the whole run.

    Raises:
        InputError: a label the model does not have, or latents that are no pictures and no `decode`.
    """
    check_labels(labels, check_model(model).num_classes)
    check_drawable(model.input_shape, decode)
    mesh = make_mesh(devices=jax.local_devices())
    # Images a program draws: the same number on every device.
    width = -(-min(batch_size, len(labels)) // mesh.size) * mesh.size
    count = -(-len(labels) // batch_size)
    mine = [number for number in range(count) if number % jax.process_count() == jax.process_index()]
    todo = [number for number in mine if not folder.has(number)]
    key = seed_key(seed)
    done = sum(len(_rows(number, batch_size, len(labels))) for number in mine if number not in set(todo))
    total = sum(len(_rows(number, batch_size, len(labels))) for number in mine)
    with WorkBar("sampling", "images", total, done) as bar, jax.set_mesh(mesh):
        if done:
            bar.say(f"{done} of {total} images are there already, in {folder.path}")
        for number in todo:
            rows = _rows(number, batch_size, len(labels))
            # The program always sees a batch of one size; what fills it up is thrown away.
            filled = np.resize(rows, width)
            placed, indices = jax.device_put((labels[filled].astype(np.int32), filled), batch_sharding(mesh))
            latents = sampler(model, placed, key, indices=indices, **_rows_of(call, filled))
            pictures = np.asarray(latents if decode is None else decode(latents))[: len(rows)]
            block = finish(pictures, labels[rows], rows)
            each(block)
            folder.write(number, block)
            bar.advance(len(rows))
    barrier("every block is drawn")
    return count


def finish(pictures: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> Block:
    """Pictures in [-1, 1] as a block of uint8; those that hold NaN or Inf become white and are marked."""
    finite = np.isfinite(pictures).reshape(len(pictures), -1).all(axis=1)
    clean = np.where(finite[:, None, None, None], pictures, 1.0)
    return Block(images.to_uint8(clean), np.asarray(labels, np.int64), np.asarray(indices, np.int64), finite)


def check_drawable(shape: tuple[int, int, int], decode: Decode | None) -> None:
    """Raise InputError unless the model's latents can become pictures."""
    if decode is None and shape[-1] not in (1, 3):
        raise InputError(
            f"this model draws latents {shape}, and only 1 or 3 channels are a picture: they have to be decoded by "
            "the VAE whose latents it was trained on."
        )


def unfinished_folder(out: Path) -> Path:
    """Where the blocks of a run that writes `out` are kept."""
    return out.with_name(f"{out.name}.unfinished")


def _rows(number: int, batch_size: int, count: int) -> np.ndarray:
    return np.arange(number * batch_size, min((number + 1) * batch_size, count))


def _rows_of(call: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """The sampler's arguments with those given for each image cut to the rows of a block."""
    return {
        name: value[rows] if isinstance(value, np.ndarray) and value.ndim == 1 else value
        for name, value in call.items()
    }
