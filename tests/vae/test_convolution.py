import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mpdit_jax.vae import convolution
from mpdit_jax.vae.blocks import Conv
from tests.conftest import relative_error


def reference(x, kernel):
    """Correlate with zero padding in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))


def arrays(shape, outputs, dtype=jnp.float32):
    random = np.random.default_rng(0)
    x = random.normal(size=shape).astype(np.float32)
    kernel = random.normal(size=(3, 3, shape[-1], outputs)).astype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(kernel)


def conv2d(x, kernel):
    return convolution.conv2d(x, kernel, jnp.zeros(kernel.shape[3]), padding=(1, 1))


def upsample_conv2d(x, kernel):
    return convolution.upsample_conv2d(x, kernel, jnp.zeros(kernel.shape[3]))


# The first two shapes use the Winograd algorithm, the others the direct one.
@pytest.mark.parametrize("shape", [(1, 64, 64, 64), (2, 33, 128, 72), (1, 64, 66, 64), (1, 8, 8, 64)])
def test_is_a_correlation(shape):
    x, kernel = arrays(shape, 80)
    found = jax.jit(conv2d)(x, kernel)
    assert relative_error(found, reference(x, kernel)) < 2e-5


def test_winograd_is_used_on_cpus_alone():
    x, kernel = arrays((1, 64, 64, 64), 64)
    traced = jax.jit(conv2d).trace(x, kernel)
    counts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert counts == {"cpu": 6, "cuda": 1, "tpu": 1}


def test_upsampling_convolves_the_doubled_image():
    x, kernel = arrays((2, 5, 6, 7), 9)
    doubled = np.asarray(x).repeat(2, axis=1).repeat(2, axis=2)
    for upsample in (upsample_conv2d, convolution._repeat_then_conv):
        assert relative_error(jax.jit(upsample)(x, kernel), reference(doubled, kernel)) < 1e-5


@pytest.mark.parametrize("convolve", [conv2d, upsample_conv2d])
def test_gradients_are_those_of_the_plain_convolution(convolve):
    x, kernel = arrays((1, 64, 64, 64), 64)

    def plain(x, kernel):
        if convolve is upsample_conv2d:
            return convolution._repeat_then_conv(x, kernel)
        return convolution._direct(x, kernel, stride=1, padding=((1, 1), (1, 1)))

    for argument in (0, 1):
        found, expected = (
            jax.jit(jax.grad(lambda x, k, f=f: jnp.sin(f(x, k) / 30).sum(), argnums=argument))(x, kernel)
            for f in (convolve, plain)
        )
        assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("shape", [(1, 64, 64, 64), (1, 8, 8, 16)])
def test_rounds_bfloat16_once(shape):
    x, kernel = arrays(shape, 64, jnp.bfloat16)
    layer = Conv(shape[-1], 64, 3, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = kernel, jnp.linspace(-10, 10, 64)
    found, exact = layer(x), reference(x.astype(jnp.float32), kernel) + np.linspace(-10, 10, 64)
    assert (found.dtype, layer(x, jnp.float32).dtype) == (jnp.bfloat16, jnp.float32)
    # 2**-8 is half a unit in the last of bfloat16's 8 bits.
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-2)
