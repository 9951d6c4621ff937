"""Bilinear resizing as TensorFlow and PyTorch do it; the difference changes published numbers."""

import jax
import jax.numpy as jnp
import numpy as np


def bilinear_weights(size: int, target: int, *, half_pixel: bool) -> np.ndarray:
    """Bilinear interpolation without antialiasing as a matrix, float32 (target, size).

    TensorFlow 1, and with it FID, aligns the first pixels' corners: output i samples i · size / target.
    With `half_pixel` it samples (i + ½) · size / target - ½, as PyTorch and newer TensorFlow do. Beyond the border the
    outermost pixel is repeated.
    """
    # In float32, as both libraries compute it: other rounding moves a position by a 10,000th of a pixel.
    index, scale, half = np.arange(target, dtype=np.float32), np.float32(size / target), np.float32(0.5)
    place = np.maximum(scale * (index + half) - half, np.float32(0)) if half_pixel else index * scale
    lower = np.floor(place).astype(int)
    upper, share = np.minimum(lower + 1, size - 1), place - lower
    weights = np.zeros((target, size), np.float32)
    np.add.at(weights, (np.arange(target), np.minimum(lower, size - 1)), 1 - share)
    np.add.at(weights, (np.arange(target), upper), share)
    return weights


def resize(x: jax.Array, target: int, *, half_pixel: bool) -> jax.Array:
    """(B, H, W, C) to (B, target, target, C), see `bilinear_weights`; two small matrix products."""
    rows, columns = (bilinear_weights(size, target, half_pixel=half_pixel) for size in x.shape[1:3])
    if x.shape[1:3] == (target, target):
        return x
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("th,bhwc->btwc", rows, x, precision=exact)  # (B, target, W, C)
    return jnp.einsum("tw,bhwc->bhtc", columns, x, precision=exact)  # (B, target, target, C)
