"""Upsamplers from coarse tokens to fine tokens (paper, section 3.1 and its ablation of upsamplers).

The published code has "linear_linear". The paper's table names the other four without defining them; each definition
here changes one thing. D is the model's width, r the ratio of patch sizes; parameter counts leave out biases:

- "linear_linear": Linear(D -> D r²), pixel shuffle and GELU of the image tokens, then norm and Linear(D -> D) of class
  and image tokens. (r² + 1) D² parameters.
- "linear": Linear(D -> D r²) and pixel shuffle alone. r² D² parameters.
- "linear_mlp": the blocks' MLP in place of Linear(D -> D). (r² + 2 mlp_ratio) D² parameters.
- "linear_conv": a 3x3 convolution of the image tokens in place of Linear(D -> D). (r² + 9) D² parameters.
- "conv_transpose": a transposed convolution of stride r and kernel 2r, so that windows overlap (with kernel r it would
  be "linear"). 4 r² D² parameters.

Class tokens pass unchanged through "linear", "linear_conv" and "conv_transpose".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mpdit_jax.model.blocks import MLP, gelu, layer_norm
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.kernels import of_one_dtype, operand_precision
from mpdit_jax.model.linear import XAVIER_UNIFORM, linear

CONV_KERNEL = 3  # side of the refining convolution
TRANSPOSED_KERNEL = 2  # side of the transposed convolution, in units of its stride


class Geometry(NamedTuple):
    """The geometry of an upsampler: each token of the coarse grid (h, w) becomes factor x factor tokens."""

    factor: int
    grid: tuple[int, int]


def pixel_shuffle(x: jax.Array, grid: tuple[int, int], factor: int) -> jax.Array:
    """Turn each token into r x r tokens: (B, h*w, D*r*r) to (B, h*r*w*r, D), feature index (channel, row, column)."""
    batch, (rows, columns) = x.shape[0], grid
    x = x.reshape(batch, rows, columns, -1, factor, factor)  # (B, h, w, D, r, r)
    x = x.transpose(0, 1, 4, 2, 5, 3)  # (B, h, r, w, r, D)
    return x.reshape(batch, rows * factor * columns * factor, -1)


class LinearExpand(nnx.Module):
    """Linear(D -> D r²) and pixel shuffle."""

    def __init__(self, geometry: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, self.geometry = config.hidden_size, geometry
        self.linear = linear(width, width * geometry.factor**2, rngs, dtype=config.dtype, platform=config.platform)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Map image tokens (B, h*w, D) to (B, h*w*r*r, D)."""
        return pixel_shuffle(self.linear(image), self.geometry.grid, self.geometry.factor)


class ConvExpand(nnx.Module):
    """A transposed convolution of stride r and kernel 2r."""

    def __init__(self, geometry: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, self.grid, stride = config.hidden_size, geometry.grid, geometry.factor
        kernel, options = (TRANSPOSED_KERNEL * stride,) * 2, _conv_options(config, rngs)
        self.conv = nnx.ConvTranspose(width, width, kernel, strides=(stride, stride), **options)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Map image tokens (B, h*w, D) to (B, h*w*r*r, D)."""
        image = self.conv(_as_grid(image, self.grid))  # (B, h*r, w*r, D)
        return _as_tokens(image)


class NoRefine(nnx.Module):
    """Concatenation of class and image tokens."""

    def __init__(self, geometry: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        pass

    def __call__(self, classes: jax.Array, image: jax.Array) -> jax.Array:
        """Map class tokens (B, m, D) and image tokens (B, N, D) to (B, m + N, D)."""
        return jnp.concatenate(of_one_dtype(classes, image), axis=1)


class LinearRefine(nnx.Module):
    """GELU of the image tokens, then norm and Linear(D -> D) of all tokens."""

    def __init__(self, geometry: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.linear = linear(config.hidden_size, config.hidden_size, rngs, dtype=config.dtype, platform=config.platform)

    def __call__(self, classes: jax.Array, image: jax.Array) -> jax.Array:
        """Map class tokens (B, m, D) and image tokens (B, N, D) to (B, m + N, D)."""
        return self.linear(layer_norm(jnp.concatenate(of_one_dtype(classes, gelu(image)), axis=1)))


class MLPRefine(nnx.Module):
    """GELU of the image tokens, then norm and the blocks' MLP of all tokens."""

    def __init__(self, geometry: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.mlp = MLP(config, rngs)

    def __call__(self, classes: jax.Array, image: jax.Array) -> jax.Array:
        """Map class tokens (B, m, D) and image tokens (B, N, D) to (B, m + N, D)."""
        return self.mlp(jnp.concatenate(of_one_dtype(classes, gelu(image)), axis=1), layer_norm)


class ConvRefine(nnx.Module):
    """GELU, norm and a 3x3 convolution of the image tokens; class tokens stay as they are."""

    def __init__(self, geometry: Geometry, config: ModelConfig, rngs: nnx.Rngs) -> None:
        rows, columns = geometry.grid
        self.grid, width = (rows * geometry.factor, columns * geometry.factor), config.hidden_size
        self.conv = nnx.Conv(width, width, (CONV_KERNEL, CONV_KERNEL), **_conv_options(config, rngs))

    def __call__(self, classes: jax.Array, image: jax.Array) -> jax.Array:
        """Map class tokens (B, m, D) and image tokens (B, N, D) to (B, m + N, D)."""
        image = self.conv(_as_grid(layer_norm(gelu(image)), self.grid))  # (B, H, W, D)
        return jnp.concatenate(of_one_dtype(classes, _as_tokens(image)), axis=1)


class UpsamplerParts(NamedTuple):
    """The two modules of an upsampler: `expand` multiplies the image tokens, `refine` maps all tokens afterwards."""

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
    """The config's upsampler: every image token becomes r x r tokens. `grid` is the coarse (h, w), `factor` is r."""

    def __init__(self, factor: int, grid: tuple[int, int], config: ModelConfig, rngs: nnx.Rngs) -> None:
        parts, geometry = UPSAMPLERS[config.upsampler], Geometry(factor, grid)
        self.class_tokens = config.prefix_tokens
        self.expand, self.refine = parts.expand(geometry, config, rngs), parts.refine(geometry, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (B, m + h*w, D) to (B, m + h*w*r*r, D)."""
        classes, image = x[:, : self.class_tokens], x[:, self.class_tokens :]
        return self.refine(classes, self.expand(image))


def _conv_options(config: ModelConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    dtype = jnp.dtype(config.dtype)
    precision = operand_precision(dtype)
    return {"padding": "SAME", "dtype": dtype, "precision": precision, "kernel_init": XAVIER_UNIFORM, "rngs": rngs}


def _as_grid(image: jax.Array, grid: tuple[int, int]) -> jax.Array:
    return image.reshape(image.shape[0], *grid, image.shape[-1])  # (B, h, w, D)


def _as_tokens(image: jax.Array) -> jax.Array:
    return image.reshape(image.shape[0], -1, image.shape[-1])  # (B, h*w, D)
