"""Input embeddings: patches, sin-cos positions, and the sinusoidal time embedding."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.linear import NORMAL_002, linear

TIME_FEATURES = 256  # sinusoids of the DiT time embedding


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """Cut (B, H, W, C) into (B, H/p * W/p, p*p*C) patches, feature index (row, column, channel)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)  # (B, h, p, w, p, C)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # (B, h, w, p, p, C)
    return x.reshape(batch, (height // patch) * (width // patch), patch * patch * channels)


def unpatchify(x: jax.Array, patch: int, grid: tuple[int, int]) -> jax.Array:
    """Put the patches (B, h*w, p*p*C) back together as (B, h*p, w*p, C); the inverse of `patchify`."""
    batch, (rows, columns) = x.shape[0], grid
    x = x.reshape(batch, rows, columns, patch, patch, -1)  # (B, h, w, p, p, C)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # (B, h, p, w, p, C)
    return x.reshape(batch, rows * patch, columns * patch, -1)


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """Compute the fixed 2-D sin-cos table, float32 (rows * columns, width).

    The first half of the channels encodes the column, the second the row. Each half is [sin(pos ω), cos(pos ω)] with
    ω_i = 10000^(-i / (width/4)), computed in float64.
    """
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    quarter = width // 4
    omega = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    halves = []
    for index in (columns, rows):
        angles = index.reshape(-1, 1).astype(np.float64) * omega  # (rows * columns, width / 4)
        halves.extend([np.sin(angles), np.cos(angles)])
    return np.concatenate(halves, axis=1).astype(np.float32)


class SinusoidalTime(nnx.Module):
    """DiT's time embedding: 256 sinusoids of t, then linear layers (DiT has two) with SiLU between them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        inputs = [TIME_FEATURES] + [width] * (config.sinusoidal_layers - 1)
        self.layers = nnx.List([linear(size, width, rngs, kernel_init=NORMAL_002) for size in inputs])

    def __call__(self, t: jax.Array) -> jax.Array:
        """Embed times (B,) in [0, 1], which are not rescaled, as float32 vectors (B, D)."""
        half = TIME_FEATURES // 2
        frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
        angles = t.astype(jnp.float32)[:, None] * frequencies[None]  # (B, 128)
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # (B, 256)
        first, *rest = self.layers
        vector = first(features)  # (B, D)
        for layer in rest:
            vector = layer(nnx.silu(vector))
        return vector
