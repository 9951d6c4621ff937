"""The Inception network of 2015 that FID, sFID and IS are defined by, as published in TensorFlow's graph of that year.

Inception v3 (Szegedy et al., 2016) with the graph's own ways: 1,008 classes, average pools that leave padding out of
their means, and a last block whose pool takes maxima. The weights are a file of their own, see `inception_weights.py`.
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
    """What the metrics read, float32."""

    pool: jax.Array  # (B, 2048), "pool_3": FID, precision and recall, KID
    spatial: jax.Array  # (B, 2023), the first 7 channels of "mixed_6/conv", rows, columns, channels: sFID
    logits: jax.Array  # (B, 1008), with the last layer's bias
    unbiased_logits: jax.Array  # (B, 1008), without it: what the published Inception Score takes the softmax of


class Inception(nnx.Module):
    """Images (B, 299, 299, 3) in [-1, 1] to features."""

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
        """(B, 299, 299, 3) to the outputs; other sizes from 75 on give a `spatial` of another length."""
        x = nnx.relu(self.conv_1a(x))  # (B, 149, 149, 32)
        x = nnx.relu(self.conv_2b(nnx.relu(self.conv_2a(x))))  # (B, 147, 147, 64)
        x = max_pool(x, 2, "VALID")  # (B, 73, 73, 64)
        x = nnx.relu(self.conv_4a(nnx.relu(pointwise(x, [self.conv_3b])[0])))  # (B, 71, 71, 192)
        x = max_pool(x, 2, "VALID")  # (B, 35, 35, 192)
        x = self.mixed_5d(self.mixed_5c(self.mixed_5b(x)))  # (B, 35, 35, 288)
        x = self.mixed_6c(self.mixed_6b(self.mixed_6a(x)))  # (B, 17, 17, 768)
        x = self.mixed_6d(x)
        spatial = x[..., :SPATIAL_CHANNELS]  # the block's own 1x1 convolution comes first among its channels
        x = self.mixed_7a(self.mixed_6e(x))  # (B, 8, 8, 1280)
        x = self.mixed_7c(self.mixed_7b(x))  # (B, 8, 8, 2048)
        pool = x.mean(axis=(1, 2))  # (B, 2048)
        unbiased = jnp.matmul(pool, self.fc.kernel[0, 0], precision=jax.lax.Precision.HIGHEST)
        return InceptionOutputs(pool, spatial.reshape(len(x), -1), unbiased + self.fc.bias[...], unbiased)


def _pooled(x: jax.Array) -> jax.Array:
    # Means and a 1x1 convolution may change places, since the means' weights sum to 1: fewer channels are averaged.
    return nnx.relu(average_pool(x))


class _MixedA(nnx.Module):
    """The blocks mixed_5b to mixed_5d: 64 + 64 + 96 + `pool` channels."""

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
        three = nnx.relu(self.branch3x3dbl_3(nnx.relu(self.branch3x3dbl_2(nnx.relu(three)))))
        return jnp.concatenate(
            [nnx.relu(one), nnx.relu(self.branch5x5_2(nnx.relu(five))), three, _pooled(pool)], axis=-1
        )


class _ReductionA(nnx.Module):
    """mixed_6a: 384 + 96 + 288 channels at half the size."""

    def __init__(self, inputs: int):
        self.branch3x3 = Conv(inputs, 384, 3, stride=2, padding="VALID")
        self.branch3x3dbl_1 = Conv(inputs, 64)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, padding="VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        (double,) = pointwise(x, [self.branch3x3dbl_1])
        double = nnx.relu(self.branch3x3dbl_3(nnx.relu(self.branch3x3dbl_2(nnx.relu(double)))))
        return jnp.concatenate([nnx.relu(self.branch3x3(x)), double, max_pool(x, 2, "VALID")], axis=-1)


class _MixedC(nnx.Module):
    """The blocks mixed_6b to mixed_6e: four times 192 channels, through 7x7 factored into rows and columns."""

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
        one, seven, double, pool = pointwise(
            x, [self.branch1x1, self.branch7x7_1, self.branch7x7dbl_1, self.branch_pool]
        )
        seven = nnx.relu(self.branch7x7_3(nnx.relu(self.branch7x7_2(nnx.relu(seven)))))
        double = nnx.relu(self.branch7x7dbl_3(nnx.relu(self.branch7x7dbl_2(nnx.relu(double)))))
        double = nnx.relu(self.branch7x7dbl_5(nnx.relu(self.branch7x7dbl_4(double))))
        return jnp.concatenate([nnx.relu(one), seven, double, _pooled(pool)], axis=-1)


class _ReductionB(nnx.Module):
    """mixed_7a: 320 + 192 + 768 channels at half the size."""

    def __init__(self, inputs: int):
        self.branch3x3_1 = Conv(inputs, 192)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, padding="VALID")
        self.branch7x7x3_1 = Conv(inputs, 192)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, padding="VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        three, seven = map(nnx.relu, pointwise(x, [self.branch3x3_1, self.branch7x7x3_1]))
        seven = nnx.relu(self.branch7x7x3_3(nnx.relu(self.branch7x7x3_2(seven))))
        return jnp.concatenate(
            [nnx.relu(self.branch3x3_2(three)), nnx.relu(self.branch7x7x3_4(seven)), max_pool(x, 2, "VALID")], axis=-1
        )


class _MixedE(nnx.Module):
    """mixed_7b and mixed_7c: 320 + 768 + 768 + 192 channels; the pool of the last takes maxima."""

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
        double = nnx.relu(self.branch3x3dbl_2(double))
        if self.max_pooled:
            pool = nnx.relu(pointwise(max_pool(x, 1, "SAME"), [self.branch_pool])[0])
        else:
            pool = _pooled(pointwise(x, [self.branch_pool])[0])
        sides = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        sides += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return jnp.concatenate([one, *map(nnx.relu, sides), pool], axis=-1)
