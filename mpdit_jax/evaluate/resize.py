"""Bilinear resizing as in TensorFlow and PyTorch, whose difference changes published metrics."""

import jax
import jax.numpy as jnp
import numpy as np


def bilinear_weights(size: int, target: int, *, half_pixel: bool) -> np.ndarray:
    """Return bilinear interpolation without antialiasing as a matrix, float32 (target, size).

    Output i samples i · size / target, as in TensorFlow 1 and FID, or with `half_pixel` (i + ½) · size / target - ½, as
    in PyTorch and newer TensorFlow. The outermost pixel is repeated beyond the border.
    """
    # Both libraries compute in float32; other rounding moves a position by a 10,000th of a pixel.
    index, scale, half = np.arange(target, dtype=np.float32), np.float32(size / target), np.float32(0.5)
    place = np.maximum(scale * (index + half) - half, np.float32(0)) if half_pixel else index * scale
    lower = np.floor(place).astype(int)
    upper, share = np.minimum(lower + 1, size - 1), place - lower
    weights = np.zeros((target, size), np.float32)
    np.add.at(weights, (np.arange(target), np.minimum(lower, size - 1)), 1 - share)
    np.add.at(weights, (np.arange(target), upper), share)
    return weights


def resize(x: jax.Array, target: int, *, half_pixel: bool) -> jax.Array:
    """Resize (B, H, W, C) to (B, target, target, C) by two small matrix products, see `bilinear_weights`."""
    rows, columns = (bilinear_weights(size, target, half_pixel=half_pixel) for size in x.shape[1:3])
    if x.shape[1:3] == (target, target):
        return x
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("th,bhwc->btwc", rows, x, precision=exact)  # (B, target, W, C)
    return jnp.einsum("tw,bhwc->bhtc", columns, x, precision=exact)  # (B, target, target, C)
