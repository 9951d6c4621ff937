"""Input embeddings: patches, sin-cos positions, the sinusoidal time embedding, and the guidance scale."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.kernels import at_least_float32
from mpdit_jax.model.linear import NORMAL_002, ZEROS, linear

TIME_FEATURES = 256  # sinusoids of the DiT time embedding
GUIDANCE_FEATURES = 16  # sinusoids of the guidance scale


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
        angles = at_least_float32(t)[:, None] * frequencies[None]  # (B, 128)
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # (B, 256)
        first, *rest = self.layers
        vector = first(features)  # (B, D)
        for layer in rest:
            vector = layer(nnx.silu(vector))
        return vector


class GuidanceEmbedding(nnx.Module):
    """A zero-initialized linear map of sinusoids of 1 - 1/w, where w is the guidance scale of the velocity.

    Improved MeanFlow (arXiv 2512.02012) gives this input tokens of its own. Here it is added to the time vector, and
    changes nothing before training.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.linear = linear(GUIDANCE_FEATURES, config.hidden_size, rngs, kernel_init=ZEROS)

    def __call__(self, w: jax.Array) -> jax.Array:
        """Embed guidance scales (B,), 1 or more, as float32 vectors (B, D)."""
        frequencies = np.arange(1, GUIDANCE_FEATURES // 2 + 1, dtype=np.float32) * np.float32(np.pi / 2)
        angles = (1 - 1 / at_least_float32(w))[:, None] * frequencies[None]  # (B, 8)
        return self.linear(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1))
