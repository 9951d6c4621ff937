"""Layers of an AutoencoderKL: channels last; parameters, norms and softmax in float32."""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mpdit_jax.vae.convolution import conv2d, upsample_conv2d

# Uniform in ±1/√fan_in.
_kernel_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

_NORM_EPSILON = 1e-6


class Conv(nnx.Module):
    """A square convolution with bias. Stride 1 keeps the resolution; stride 2 pads below and on the right only."""

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_kernel_init(rngs.params(), (size, size, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))
        self.stride = stride

    def __call__(self, x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Map (B, H, W, inputs) to (B, H / stride, W / stride, outputs), in `dtype` (default that of `x`)."""
        size = self.kernel.shape[0]
        before = 0 if self.stride == 2 else (size - 1) // 2
        after = (size - 1) // 2
        y = conv2d(x, self.kernel[...], self.bias[...], stride=self.stride, padding=(before, after))
        return y.astype(x.dtype if dtype is None else dtype)


class UpsampleConv(Conv):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        super().__init__(channels, channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Map (B, H, W, C) to (B, 2H, 2W, C)."""
        return upsample_conv2d(x, self.kernel[...], self.bias[...]).astype(x.dtype if dtype is None else dtype)


class GroupNorm(nnx.Module):
    """Group norm in float32, ε = 1e-6."""

    def __init__(self, channels: int, groups: int):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize (B, H, W, C). The result is float32, so that an activation can precede rounding to bfloat16."""
        batch, height, width, channels = x.shape
        per_group = channels // self.groups
        y = x.astype(jnp.float32).reshape(batch, height * width, channels)  # (B, HW, C)
        # Summing over pixels first, then over the channels of a group, keeps the channels-last layout.
        count = height * width * per_group
        mean = self._group_sums(y.sum(1), per_group) / count  # (B, 1, C)
        variance = self._group_sums(jnp.square(y - mean).sum(1), per_group) / count  # (B, 1, C)
        factor = jax.lax.rsqrt(variance + _NORM_EPSILON) * self.scale[...][None, None]
        return ((y - mean) * factor + self.bias[...][None, None]).reshape(x.shape)

    def _group_sums(self, sums: jax.Array, per_group: int) -> jax.Array:
        """Sum (B, C) over each group and repeat the sums for its channels: (B, 1, C)."""
        grouped = sums.reshape(-1, self.groups, per_group).sum(-1)  # (B, G)
        return jnp.repeat(grouped, per_group, axis=-1)[:, None, :]


class ResidualBlock(nnx.Module):
    """Two rounds of group norm, SiLU and 3x3 convolution, added to the input (mapped by a 1x1 convolution if the
    widths differ).
    """

    def __init__(self, inputs: int, outputs: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, groups)
        self.conv1 = Conv(inputs, outputs, 3, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups)
        self.conv2 = Conv(outputs, outputs, 3, rngs=rngs)
        self.conv_shortcut = Conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, inputs) to (B, H, W, outputs)."""
        y = self.conv1(nnx.silu(self.norm1(x)).astype(x.dtype))
        y = self.conv2(nnx.silu(self.norm2(y)).astype(x.dtype))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Linear(nnx.Module):
    """A linear map of the last axis, with bias."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_kernel_init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., inputs) to (..., outputs), in the dtype of `x`."""
        product = jnp.matmul(x, self.kernel[...].astype(x.dtype), precision="highest")
        return product + self.bias[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class AttentionBlock(nnx.Module):
    """Group norm and single-head self-attention over all pixels, added to the input."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, groups)
        self.to_q = Linear(channels, channels, rngs=rngs)
        self.to_k = Linear(channels, channels, rngs=rngs)
        self.to_v = Linear(channels, channels, rngs=rngs)
        self.to_out = Linear(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the same shape; the attention weights take 4·B·(H·W)² bytes."""
        batch, height, width, channels = x.shape
        tokens = self.group_norm(x).astype(x.dtype).reshape(batch, height * width, channels)  # (B, N, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        logits = jnp.einsum("bqc,bkc->bqk", q, k, precision="highest", preferred_element_type=jnp.float32)  # (B, N, N)
        weights = jax.nn.softmax(logits * channels**-0.5, axis=-1).astype(x.dtype)
        return x + self.to_out(jnp.matmul(weights, v, precision="highest")).reshape(x.shape)


class MidBlock(nnx.Module):
    """The blocks of the lowest resolution: residual block, attention (optional), residual block."""

    def __init__(self, channels: int, groups: int, *, attention: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResidualBlock(channels, channels, groups, rngs=rngs) for _ in range(2)])
        self.attention = AttentionBlock(channels, groups, rngs=rngs) if attention else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the same shape."""
        x = self.resnets[0](x)
        if self.attention is not None:
            x = self.attention(x)
        return self.resnets[1](x)


class Stage(nnx.Module):
    """The residual blocks of one resolution, then down- or upsampling to the next (none after the last)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layers: int,
        groups: int,
        *,
        downsample: bool = False,
        upsample: bool = False,
        rngs: nnx.Rngs,
    ):
        widths = [inputs] + [outputs] * layers
        self.resnets = nnx.List([ResidualBlock(a, b, groups, rngs=rngs) for a, b in pairwise(widths)])
        self.downsample = Conv(outputs, outputs, 3, stride=2, rngs=rngs) if downsample else None
        self.upsample = UpsampleConv(outputs, rngs=rngs) if upsample else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, inputs) to (B, H, W, outputs), or to half or twice that height and width."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x
