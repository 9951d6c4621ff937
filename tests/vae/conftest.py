import jax.numpy as jnp
import numpy as np
import pytest

from mpdit_jax.vae import VAE, AutoencoderConfig
from mpdit_jax.vae.weights import abstract

TINY = AutoencoderConfig(block_out_channels=(8, 16, 16), norm_num_groups=4, scaling_factor=0.5)


def random_parameters(config, seed=0):
    """Draw weights that keep activations near 1, with biases and norms different from their initial 0 and 1."""
    random = np.random.default_rng(seed)
    parameters = {}
    for path, leaf in abstract(config)[1].items():
        kind, noise = path.rsplit(".", 1)[1], random.normal(size=leaf.shape)
        value = {"kernel": noise / np.sqrt(noise.size / leaf.shape[-1]), "scale": 1 + 0.3 * noise, "bias": 0.3 * noise}
        parameters[path] = jnp.asarray(value[kind], jnp.float32)
    return parameters


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="session")
def tiny_parameters():
    return random_parameters(TINY)


@pytest.fixture(scope="session")
def tiny_vae(tiny_parameters):
    return VAE(TINY, tiny_parameters)


def assert_bitwise_equal(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value), strict=True, err_msg=path)
