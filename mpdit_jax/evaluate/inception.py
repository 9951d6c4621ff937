"""The Inception network of 2015 that defines FID, sFID and IS, as in TensorFlow's published graph.

It is Inception v3 (Szegedy et al., 2016) with 1,008 classes, average pools without padding in their means, and a max
pool in the last block. `inception_weights.py` loads its weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mpdit_jax.evaluate.layers import Conv, average_pool, max_pool, pointwise

IMAGE_SIZE = 299
POOL, SPATIAL_CHANNELS, CLASSES = 2048, 7, 1008
SPATIAL = 17 * 17 * SPATIAL_CHANNELS  # of a 299 pixel image


class InceptionOutputs(NamedTuple):
    """Outputs that metrics read, float32."""

    pool: jax.Array  # (B, 2048), "pool_3": FID, precision and recall, KID
    spatial: jax.Array  # (B, 2023), the first 7 channels of "mixed_6/conv", rows, columns, channels: sFID
    logits: jax.Array  # (B, 1008), with the last layer's bias
    unbiased_logits: jax.Array  # (B, 1008), without it: what the published Inception Score takes the softmax of


class Inception(nnx.Module):
    """Map images (B, 299, 299, 3) in [-1, 1] to features."""

    def __init__(self) -> None:
        self.conv_1a = Conv(3, 32, 3, stride=2, padding="VALID")
        self.conv_2a = Conv(32, 32, 3, padding="VALID")
        self.conv_2b = Conv(32, 64, 3)
        self.conv_3b = Conv(64, 80)
        self.conv_4a = Conv(80, 192, 3, padding="VALID")
        self.mixed_5b = _MixedA(192, 32)
        self.mixed_5c = _MixedA(256, 64)
        self.mixed_5d = _MixedA(288, 64)
        self.mixed_6a = _ReductionA(288)
        self.mixed_6b = _MixedC(128)
        self.mixed_6c = _MixedC(160)
        self.mixed_6d = _MixedC(160)
        self.mixed_6e = _MixedC(192)
        self.mixed_7a = _ReductionB(768)
        self.mixed_7b = _MixedE(1280)
        self.mixed_7c = _MixedE(2048, max_pooled=True)
        self.fc = Conv(POOL, CLASSES)

    def __call__(self, x: jax.Array) -> InceptionOutputs:
        """Compute the outputs of (B, 299, 299, 3); other sizes from 75 on give a `spatial` of another length."""
        x = _chain(x, self.conv_1a, self.conv_2a, self.conv_2b)  # (B, 147, 147, 64)
        x = max_pool(x, 2, "VALID")  # (B, 73, 73, 64)
        x = _chain(nnx.relu(pointwise(x, [self.conv_3b])[0]), self.conv_4a)  # (B, 71, 71, 192)
        x = max_pool(x, 2, "VALID")  # (B, 35, 35, 192)
        x = self.mixed_5d(self.mixed_5c(self.mixed_5b(x)))  # (B, 35, 35, 288)
        x = self.mixed_6c(self.mixed_6b(self.mixed_6a(x)))  # (B, 17, 17, 768)
        x = self.mixed_6d(x)
        spatial = x[..., :SPATIAL_CHANNELS]  # the block's first channels are its 1x1 convolution
        x = self.mixed_7a(self.mixed_6e(x))  # (B, 8, 8, 1280)
        x = self.mixed_7c(self.mixed_7b(x))  # (B, 8, 8, 2048)
        pool = x.mean(axis=(1, 2))  # (B, 2048)
        unbiased = jnp.matmul(pool, self.fc.kernel[0, 0], precision=jax.lax.Precision.HIGHEST)
        return InceptionOutputs(pool, spatial.reshape(len(x), -1), unbiased + self.fc.bias[None], unbiased)


def _chain(x: jax.Array, *convolutions: Conv) -> jax.Array:
    for convolution in convolutions:
        x = nnx.relu(convolution(x))
    return x


def _pooled(x: jax.Array) -> jax.Array:
    # The 1x1 convolution comes before the mean, since the two commute and it leaves fewer channels to average.
    return nnx.relu(average_pool(x))


class _MixedA(nnx.Module):
    """Blocks mixed_5b to mixed_5d: 64 + 64 + 96 + `pool` channels."""

    def __init__(self, inputs: int, pool: int):
        self.branch1x1 = Conv(inputs, 64)
        self.branch5x5_1 = Conv(inputs, 48)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(inputs, 64)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(inputs, pool)

    def __call__(self, x: jax.Array) -> jax.Array:
        one, five, three, pool = pointwise(x, [self.branch1x1, self.branch5x5_1, self.branch3x3dbl_1, self.branch_pool])
        three = _chain(nnx.relu(three), self.branch3x3dbl_2, self.branch3x3dbl_3)
        return jnp.concatenate([nnx.relu(one), _chain(nnx.relu(five), self.branch5x5_2), three, _pooled(pool)], -1)


class _ReductionA(nnx.Module):
    """Block mixed_6a: 384 + 96 + 288 channels at half the size."""

    def __init__(self, inputs: int):
        self.branch3x3 = Conv(inputs, 384, 3, stride=2, padding="VALID")
        self.branch3x3dbl_1 = Conv(inputs, 64)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, padding="VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        double = nnx.relu(pointwise(x, [self.branch3x3dbl_1])[0])
        double = _chain(double, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return jnp.concatenate([nnx.relu(self.branch3x3(x)), double, max_pool(x, 2, "VALID")], axis=-1)


class _MixedC(nnx.Module):
    """Blocks mixed_6b to mixed_6e: 4 times 192 channels, with 7x7 factored into rows and columns."""

    def __init__(self, channels: int):
        self.branch1x1 = Conv(768, 192)
        self.branch7x7_1 = Conv(768, channels)
        self.branch7x7_2 = Conv(channels, channels, (1, 7))
        self.branch7x7_3 = Conv(channels, 192, (7, 1))
        self.branch7x7dbl_1 = Conv(768, channels)
        self.branch7x7dbl_2 = Conv(channels, channels, (7, 1))
        self.branch7x7dbl_3 = Conv(channels, channels, (1, 7))
        self.branch7x7dbl_4 = Conv(channels, channels, (7, 1))
        self.branch7x7dbl_5 = Conv(channels, 192, (1, 7))
        self.branch_pool = Conv(768, 192)

    def __call__(self, x: jax.Array) -> jax.Array:
        first = [self.branch1x1, self.branch7x7_1, self.branch7x7dbl_1, self.branch_pool]
        one, seven, double, pool = pointwise(x, first)
        seven = _chain(nnx.relu(seven), self.branch7x7_2, self.branch7x7_3)
        double = _chain(nnx.relu(double), self.branch7x7dbl_2, self.branch7x7dbl_3)
        double = _chain(double, self.branch7x7dbl_4, self.branch7x7dbl_5)
        return jnp.concatenate([nnx.relu(one), seven, double, _pooled(pool)], axis=-1)


class _ReductionB(nnx.Module):
    """Block mixed_7a: 320 + 192 + 768 channels at half the size."""

    def __init__(self, inputs: int):
        self.branch3x3_1 = Conv(inputs, 192)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, padding="VALID")
        self.branch7x7x3_1 = Conv(inputs, 192)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, padding="VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        three, seven = map(nnx.relu, pointwise(x, [self.branch3x3_1, self.branch7x7x3_1]))
        seven = _chain(seven, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return jnp.concatenate([_chain(three, self.branch3x3_2), seven, max_pool(x, 2, "VALID")], axis=-1)


class _MixedE(nnx.Module):
    """Blocks mixed_7b and mixed_7c: 320 + 768 + 768 + 192 channels; mixed_7c has a max pool."""

    def __init__(self, inputs: int, *, max_pooled: bool = False):
        self.branch1x1 = Conv(inputs, 320)
        self.branch3x3_1 = Conv(inputs, 384)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(inputs, 448)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(inputs, 192)
        self.max_pooled = max_pooled

    def __call__(self, x: jax.Array) -> jax.Array:
        one, three, double = map(nnx.relu, pointwise(x, [self.branch1x1, self.branch3x3_1, self.branch3x3dbl_1]))
        double = _chain(double, self.branch3x3dbl_2)
        if self.max_pooled:
            pool = nnx.relu(pointwise(max_pool(x, 1, "SAME"), [self.branch_pool])[0])
        else:
            pool = _pooled(pointwise(x, [self.branch_pool])[0])
        sides = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        sides += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return jnp.concatenate([one, *map(nnx.relu, sides), pool], axis=-1)
