import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpdit_jax.vae import VAE, Tiling
from mpdit_jax.vae.tiling import apply_tiled
from tests.vae.conftest import TINY, random_images


@pytest.mark.parametrize(("height", "width"), [(7, 40), (16, 16), (17, 8), (33, 29), (9, 9)])
def test_tiles_of_a_local_function_give_the_function(height, width):
    x = jnp.asarray(random_images(2, height, width, 3))

    def double(piece):
        return jnp.repeat(jnp.repeat(piece, 2, axis=1), 2, axis=2)[..., :2]

    found = jax.jit(lambda x: apply_tiled(double, x, tile=8, overlap=3, units=(1, 2)))(x)
    np.testing.assert_allclose(found, double(x), atol=1e-6)


def test_every_tile_has_the_size_asked_for():
    sizes = []

    def halve(piece):
        sizes.append(piece.shape[1:3])
        return piece[:, ::2, ::2]

    apply_tiled(halve, jnp.zeros((1, 40, 12, 1)), tile=8, overlap=2, units=(2, 1))
    assert set(sizes) == {(16, 12)}


def test_an_image_no_larger_than_a_tile_is_not_cut(tiny_vae, tiny_parameters):
    tiled = VAE(TINY, tiny_parameters, tiling=Tiling(size=32, overlap=8))
    images = random_images(1, 32, 16, 3)
    np.testing.assert_array_equal(tiled.encode(images)[0], tiny_vae.encode(images)[0])


@pytest.mark.slow
def test_tiled_is_close_to_untiled(tiny_vae, tiny_parameters):
    # A texture that is the same all over, so that a tile's group norms see what the image's see.
    rows, columns = np.mgrid[:192, :256] * 2 * np.pi / 16
    texture = np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], axis=-1)
    images = 0.8 * texture[None].astype(np.float32) + 0.2 * random_images(1, 192, 256, 3)
    tiled = VAE(TINY, tiny_parameters, tiling=Tiling(size=128, overlap=64))
    latents = tiny_vae.encode(images)[0]
    pairs = [(tiled.decode(latents, clip=False), tiny_vae.decode(latents, clip=False))]
    pairs += zip(tiled.encode(images), tiny_vae.encode(images), strict=True)
    for found, expected in pairs:
        assert found.shape == expected.shape
        difference = np.sqrt(np.square(found - expected).mean()) / np.std(expected)
        assert 0 < difference < 0.1
