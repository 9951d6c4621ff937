"""Draw images from a model in batches, or in blocks on disk that processes share and that survive a crash."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from mpdit_jax.distributed.collectives import barrier
from mpdit_jax.distributed.mesh import batch_sharding
from mpdit_jax.errors import InputError
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.flow.sampler import Sampler
from mpdit_jax.io import pictures as images
from mpdit_jax.runtime.progress import WorkBar
from mpdit_jax.sample.blocks import Block, BlockFolder

Decode: TypeAlias = Callable[[jax.Array], jax.Array]
"""Maps latents (n, h, w, c) to images (n, H, W, 1 or 3) in [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Images to draw, one a label. Image i depends only on (seed, i, labels[i]) and the settings."""

    sampler: Sampler
    model: Any
    labels: np.ndarray  # int (N,)
    seed: int  # of the noise
    batch_size: int  # rounded up to the mesh's devices
    decode: Decode | None = None  # None for a model of images
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the sampler; arrays (N,) are per image
    mesh: Mesh | None = None  # devices that share a batch; None leaves the placement to JAX

    def __len__(self) -> int:
        return len(self.labels)

    def check(self) -> None:
        """Raise the sampler's errors, by tracing one image, before there is a folder or a progress bar."""
        jax.eval_shape(lambda: self.sampler(self.model, self.labels[:1], seed_key(0), **self.call))

    def draw(self, rows: np.ndarray) -> Block:
        """Draw the images of these numbers (n,), `batch_size` at most."""
        width = min(self.batch_size, len(self))
        if self.mesh is not None:
            width = -(-width // self.mesh.size) * self.mesh.size
        filled = np.resize(rows, width)  # full batches only, so that there is one compilation
        call = {name: value[filled] if _is_row(value) else value for name, value in self.call.items()}
        batch: Any = self.labels[filled].astype(np.int32), filled
        with nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            if self.mesh is not None:
                batch = jax.device_put(batch, batch_sharding(self.mesh))
            latents = self.sampler(self.model, batch[0], seed_key(self.seed), indices=batch[1], **call)
            pictures = np.asarray(latents if self.decode is None else self.decode(latents))[: len(rows)]
        return to_block(pictures, self.labels[rows], rows)


def draw_blocks(drawing: Drawing, folder: BlockFolder, each: Callable[[Block], None]) -> int:
    """Draw all images into blocks of `batch_size` on disk and return the number of blocks. Collective.

    Every process draws its own unfinished blocks, see `own_blocks`, and calls `each` with a block before storing it.
    """
    mine = own_blocks(len(drawing), drawing.batch_size)
    todo = {number: rows for number, rows in mine.items() if not folder.has(number)}
    total, left = (sum(map(len, blocks.values())) for blocks in (mine, todo))
    with WorkBar("sampling", "images", total, total - left) as bar:
        if left < total:
            bar.say(f"{total - left} of {total} images are there already, in {folder.path}")
        for number, rows in todo.items():
            block = drawing.draw(rows)
            each(block)
            folder.write(number, block)
            bar.advance(len(rows))
    barrier("every block is drawn")
    return -(-len(drawing) // drawing.batch_size)


def own_blocks(total: int, size: int) -> dict[int, np.ndarray]:
    """Return this process's blocks of `total` rows by number; block b is that of process b % process_count."""
    numbers = range(jax.process_index(), -(-total // size), jax.process_count())
    return {number: np.arange(number * size, min((number + 1) * size, total)) for number in numbers}


def to_block(pictures: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> Block:
    """Convert pictures (n, H, W, 1 or 3) in [-1, 1] to a uint8 block, with white for pictures that hold NaN or Inf.

    Raises InputError for another shape or for whole numbers, which a user's own decoder may return.
    """
    if pictures.ndim != 4 or pictures.shape[3] not in (1, 3) or pictures.dtype.kind in "iu":
        raise InputError(
            f"decoded pictures are {pictures.dtype} {pictures.shape}: expected floats in [-1, 1] of shape (n, H, W, 1 "
            "or 3), channels last."
        )
    finite = np.isfinite(pictures).reshape(len(pictures), -1).all(axis=1)
    clean = np.where(finite[:, None, None, None], pictures, 1.0)
    return Block(images.to_uint8(clean), np.asarray(labels, np.int64), np.asarray(indices, np.int64), finite)


def check_drawable(shape: tuple[int, int, int], decode: Decode | None) -> None:
    """Raise InputError unless the model's latents can become pictures."""
    if decode is None and shape[-1] not in (1, 3):
        raise InputError(
            f"this model draws latents {shape}, and only 1 or 3 channels are a picture: latents have to be decoded by "
            "the VAE that the model was trained with."
        )


def _is_row(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1
