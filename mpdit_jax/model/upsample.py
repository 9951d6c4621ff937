"""From coarse tokens to fine tokens, by name (paper, section 3.1 and the upsamplers of its ablation).

The published code has "linear_linear". The paper names the other four in its table without defining them; here they are
what changes one thing about it, and D² stands for a matrix of the model's width, r for the ratio of patch sizes:

- "linear_linear": Linear(D -> D r²), pixel shuffle, GELU; then over class and image tokens, norm and Linear(D -> D).
  (r² + 1) D² parameters.
- "linear": the first map and the shuffle alone. r² D².
- "linear_mlp": the blocks' MLP in place of the second map. (r² + 2 mlp_ratio) D².
- "linear_conv": a 3x3 convolution over the image tokens in its place; class tokens pass beside. (r² + 9) D².
- "conv_transpose": one transposed convolution of stride r with kernel 2r, so that windows overlap as is usual (one of
  kernel r is "linear" with fewer biases); class tokens pass beside. 4 r² D².
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mpdit_jax.model.blocks import MLP, gelu, layer_norm
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.linear import XAVIER_UNIFORM, linear

CONV_KERNEL = 3  # side of the refining convolution
TRANSPOSED_KERNEL = 2  # side of the transposed convolution, times its stride


class Geometry(NamedTuple):
    """Where tokens are opened: each of the coarse grid's (h, w) into factor x factor."""

    factor: int
    grid: tuple[int, int]


def pixel_shuffle(x: jax.Array, grid: tuple[int, int], factor: int) -> jax.Array:
    """(B, h*w, D*r*r) to (B, h*r*w*r, D): each token opens into r x r; feature index (channel, row, column)."""
    batch, (rows, columns) = x.shape[0], grid
    x = x.reshape(batch, rows, columns, -1, factor, factor)  # (B, h, w, D, r, r)
    x = x.transpose(0, 1, 4, 2, 5, 3)  # (B, h, r, w, r, D)
    return x.reshape(batch, rows * factor * columns * factor, -1)


class LinearExpand(nnx.Module):
    """Linear(D -> D r²) and pixel shuffle."""

    def __init__(self, place: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, self.place = config.hidden_size, place
        self.linear = linear(width, width * place.factor**2, rngs, dtype=config.dtype, platform=config.platform)

    def __call__(self, image: jax.Array) -> jax.Array:
        """(B, h*w, D) to (B, h*w*r*r, D)."""
        return pixel_shuffle(self.linear(image), self.place.grid, self.place.factor)


class ConvExpand(nnx.Module):
    """A transposed convolution of stride r and kernel 2r."""

    def __init__(self, place: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, self.grid = config.hidden_size, place.grid
        side = TRANSPOSED_KERNEL * place.factor
        self.conv = nnx.ConvTranspose(
            width,
            width,
            (side, side),
            strides=(place.factor, place.factor),
            padding="SAME",
            dtype=jnp.dtype(config.dtype),
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=XAVIER_UNIFORM,
            rngs=rngs,
        )

    def __call__(self, image: jax.Array) -> jax.Array:
        """(B, h*w, D) to (B, h*w*r*r, D)."""
        image = self.conv(_as_grid(image, self.grid))  # (B, h*r, w*r, D)
        return _as_tokens(image)


class NoRefine(nnx.Module):
    """Class tokens and opened tokens as they are."""

    def __init__(self, place: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        pass

    def __call__(self, classes: jax.Array, image: jax.Array) -> jax.Array:
        """(B, m, D) and (B, N, D) to (B, m + N, D)."""
        return jnp.concatenate([classes, image], axis=1)


class LinearRefine(nnx.Module):
    """GELU of the opened tokens; then all tokens through norm and Linear(D -> D)."""

    def __init__(self, place: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.linear = linear(config.hidden_size, config.hidden_size, rngs, dtype=config.dtype, platform=config.platform)

    def __call__(self, classes: jax.Array, image: jax.Array) -> jax.Array:
        """(B, m, D) and (B, N, D) to (B, m + N, D)."""
        return self.linear(layer_norm(jnp.concatenate([classes, gelu(image)], axis=1)))


class MLPRefine(nnx.Module):
    """GELU of the opened tokens; then all tokens through norm and the blocks' MLP."""

    def __init__(self, place: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.mlp = MLP(config, rngs)

    def __call__(self, classes: jax.Array, image: jax.Array) -> jax.Array:
        """(B, m, D) and (B, N, D) to (B, m + N, D)."""
        return self.mlp(jnp.concatenate([classes, gelu(image)], axis=1), layer_norm)


class ConvRefine(nnx.Module):
    """GELU, norm and a 3x3 convolution of the opened tokens; class tokens pass beside."""

    def __init__(self, place: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        rows, columns = place.grid
        self.grid, width = (rows * place.factor, columns * place.factor), config.hidden_size
        self.conv = nnx.Conv(
            width,
            width,
            (CONV_KERNEL, CONV_KERNEL),
            padding="SAME",
            dtype=jnp.dtype(config.dtype),
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=XAVIER_UNIFORM,
            rngs=rngs,
        )

    def __call__(self, classes: jax.Array, image: jax.Array) -> jax.Array:
        """(B, m, D) and (B, N, D) to (B, m + N, D)."""
        image = self.conv(_as_grid(layer_norm(gelu(image)), self.grid))  # (B, H, W, D)
        return jnp.concatenate([classes, _as_tokens(image)], axis=1)


class UpsamplerParts(NamedTuple):
    """What opens the image tokens, and what comes after."""

    expand: Callable[[Geometry, ModelConfig, nnx.Rngs], nnx.Module]
    refine: Callable[[Geometry, ModelConfig, nnx.Rngs], nnx.Module]


UPSAMPLERS = {
    "linear_linear": UpsamplerParts(LinearExpand, LinearRefine),
    "linear": UpsamplerParts(LinearExpand, NoRefine),
    "linear_mlp": UpsamplerParts(LinearExpand, MLPRefine),
    "linear_conv": UpsamplerParts(LinearExpand, ConvRefine),
    "conv_transpose": UpsamplerParts(ConvExpand, NoRefine),
}


class Upsample(nnx.Module):
    """Open every image token into r x r tokens, with the class tokens beside or refined together with them."""

    def __init__(self, factor: int, grid: tuple[int, int], config: ModelConfig, rngs: nnx.Rngs) -> None:
        parts, place = UPSAMPLERS[config.upsampler], Geometry(factor, grid)
        self.class_tokens = config.prefix_tokens
        self.expand, self.refine = parts.expand(place, config, rngs), parts.refine(place, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, m + h*w, D) to (B, m + h*w*r*r, D); `grid` is the coarse (h, w)."""
        classes, image = x[:, : self.class_tokens], x[:, self.class_tokens :]
        return self.refine(classes, self.expand(image))


def _as_grid(image: jax.Array, grid: tuple[int, int]) -> jax.Array:
    return image.reshape(image.shape[0], *grid, image.shape[-1])  # (B, h, w, D)


def _as_tokens(image: jax.Array) -> jax.Array:
    return image.reshape(image.shape[0], -1, image.shape[-1])  # (B, h*w, D)
