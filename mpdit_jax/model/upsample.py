"""From coarse tokens to fine tokens (paper, section 3.1; the "linear + linear" variant of its ablation)."""

import jax
from flax import nnx

from mpdit_jax.model.blocks import layer_norm
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.linear import linear


def pixel_shuffle(x: jax.Array, grid: tuple[int, int], factor: int) -> jax.Array:
    """(B, h*w, D*r*r) to (B, h*r*w*r, D): each token opens into r x r; feature index (channel, row, column)."""
    batch, (rows, columns) = x.shape[0], grid
    x = x.reshape(batch, rows, columns, -1, factor, factor)  # (B, h, w, D, r, r)
    x = x.transpose(0, 1, 4, 2, 5, 3)  # (B, h, r, w, r, D)
    return x.reshape(batch, rows * factor * columns * factor, -1)


class Upsample(nnx.Module):
    """Open every image token into r x r tokens, then refine class and image tokens together."""

    def __init__(self, factor: int, grid: tuple[int, int], config: ModelConfig, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.factor, self.grid, self.class_tokens = factor, grid, config.prefix_tokens
        self.expand = linear(width, width * factor * factor, rngs, dtype=config.dtype, platform=config.platform)
        self.refine = linear(width, width, rngs, dtype=config.dtype, platform=config.platform)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, m + h*w, D) to (B, m + h*w*r*r, D); `grid` is the coarse (h, w)."""
        classes, image = x[:, : self.class_tokens], x[:, self.class_tokens :]
        image = pixel_shuffle(self.expand(image), self.grid, self.factor)  # (B, h*w*r*r, D)
        x = jax.numpy.concatenate([classes, jax.nn.gelu(image, approximate=True)], axis=1)
        return self.refine(layer_norm(x))
