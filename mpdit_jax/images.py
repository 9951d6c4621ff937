"""From arrays to pictures."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mpdit_jax.errors import InputError
from mpdit_jax.files import replacing

_TILE = 40  # pixels; smaller images are enlarged by a whole factor so that a person can see them
_GAP = 2  # pixels between tiles


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1], (..., H, W, C) float, to uint8 by rounding; values outside are clipped.

    Raises:
        InputError: NaN or Inf, with the index of the first such image.
    """
    finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
    if not finite.all():
        raise InputError(f"image {int(np.argmin(finite))} of {len(images)} holds NaN or Inf; the model has diverged.")
    return np.clip(np.rint((np.asarray(images, np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Tile uint8 (N, H, W, C) row by row into one (height, width, C) picture on white."""
    factor = max(1, -(-_TILE // images.shape[1]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top = _GAP + (index // columns) * (height + _GAP)
        left = _GAP + (index % columns) * (width + _GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet


def encode_png(picture: np.ndarray) -> bytes:
    """PNG bytes of uint8 (H, W, 1) or (H, W, 3)."""
    if picture.shape[-1] not in (1, 3):
        raise InputError(f"a picture has 1 or 3 channels, not {picture.shape[-1]}: decode latents before drawing them.")
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: str | Path, picture: np.ndarray) -> None:
    """Write uint8 (H, W, 1) or (H, W, 3) as PNG."""
    data = encode_png(picture)
    with replacing(path) as file:
        file.write(data)


def save_npz(path: str | Path, images: np.ndarray, labels: Sequence[int] | np.ndarray) -> None:
    """Write uint8 (N, H, W, C) as `arr_0`, as ADM's evaluator reads it, with int64 `labels` beside it."""
    with replacing(path) as file:
        np.savez(file, arr_0=images, labels=np.asarray(labels, np.int64))
