import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import FrozenConfigDict

from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.train.vae import _initial_state, _make_update
from mpdit_jax.vae import VAE, AutoencoderConfig, Tiling
from mpdit_jax.vae.autoencoder import mean_and_std
from tests.conftest import relative_error
from tests.vae.conftest import TINY, random_images, random_parameters


def test_shapes_dtypes_and_metadata(tiny_vae):
    mean, std = tiny_vae.encode(random_images(2, 16, 24, 3))
    assert mean.shape == std.shape == (2, 4, 6, 4)
    assert mean.dtype == std.dtype == jnp.float32
    assert (std > 0).all()
    images = tiny_vae.decode(mean)
    assert images.shape == (2, 16, 24, 3)
    assert images.dtype == jnp.float32
    assert (tiny_vae.downsample_factor, tiny_vae.latent_channels) == (4, 4)
    assert (tiny_vae.scaling_factor, tiny_vae.shift_factor) == (0.5, 0.0)


def test_decoded_images_are_clipped_unless_asked_otherwise(tiny_vae):
    latents = 30 * random_images(2, 4, 4, 4)
    raw = tiny_vae.decode(latents, clip=False)
    assert jnp.abs(raw).max() > 1
    np.testing.assert_array_equal(tiny_vae.decode(latents), jnp.clip(raw, -1, 1))


def test_standard_deviation_is_that_of_the_clipped_log_variance():
    moments = jnp.array([[[[1.0, -100.0]]], [[[2.0, 100.0]]], [[[3.0, 2.0]]]])
    mean, std = mean_and_std(moments)
    np.testing.assert_array_equal(mean.ravel(), [1, 2, 3])
    np.testing.assert_allclose(std.ravel(), np.exp([-15.0, 10.0, 1.0]), rtol=1e-6)


def test_an_image_does_not_depend_on_its_batch(tiny_vae):
    images = random_images(3, 16, 16, 3)
    together = tiny_vae.encode(images)[0]
    alone = jnp.concatenate([tiny_vae.encode(image[None])[0] for image in images])
    assert relative_error(together, alone) < 1e-5


def test_bfloat16_is_close_and_keeps_float32_parameters(tiny_vae, tiny_parameters):
    half = VAE(TINY, tiny_parameters, dtype="bfloat16")
    images = random_images(2, 16, 16, 3)
    mean = half.encode(images)[0]
    assert mean.dtype == jnp.float32
    assert {value.dtype for value in half.parameters.values()} == {jnp.dtype("float32")}
    error = relative_error(mean, tiny_vae.encode(images)[0])
    assert 1e-5 < error < 5e-2  # really computed in bfloat16


@pytest.mark.slow
def test_works_inside_a_jit_and_gives_gradients(tiny_vae):
    latents = random_images(1, 4, 4, 4)

    @jax.jit
    @jax.value_and_grad
    def total(z):
        return jnp.square(tiny_vae.decode(z, clip=False)).sum()

    value, gradient = total(latents)
    assert relative_error(value, np.square(tiny_vae.decode(latents, clip=False)).sum()) < 1e-5
    step = 1e-2 * gradient / np.linalg.norm(gradient)
    slope = (total(latents + step)[0] - total(latents - step)[0]) / 2e-2
    assert abs(slope / np.linalg.norm(gradient) - 1) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"mid_block_add_attention": False},
        {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16, "shift_factor": 0.1},
        {"in_channels": 1, "out_channels": 2, "layers_per_block": 2},
        {"block_out_channels": (8,)},
    ],
)
def test_variants_of_the_family(fields):
    config = AutoencoderConfig(**{"block_out_channels": (8, 16), "norm_num_groups": 4} | fields)
    vae = VAE(config, random_parameters(config))
    mean, _ = vae.encode(random_images(1, 8, 8, config.in_channels))
    side = 8 // vae.downsample_factor
    assert mean.shape == (1, side, side, config.latent_channels)
    assert vae.decode(mean).shape == (1, 8, 8, config.out_channels)
    assert vae.shift_factor == (config.shift_factor or 0.0)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((1, 16, 16, 3), np.uint8), ["uint8", "127.5"]),
        (np.zeros((1, 3, 16, 16), np.float32), ["(1, 3, 16, 16)", "channels last", "give images.transpose"]),
        (np.zeros((16, 16, 3), np.float32), ["(16, 16, 3)"]),
        (np.zeros((0, 16, 16, 3), np.float32), ["(0, 16, 16, 3)"]),
        (np.zeros((1, 18, 16, 3), np.float32), ["18x16", "factor 4"]),
        (np.zeros((1, 2, 2, 3), np.float32), ["2x2"]),
        (np.full((1, 16, 16, 3), 255.0), ["255", "[-1, 1]"]),
        (np.full((2, 16, 16, 3), np.nan, np.float32), ["NaN", "index 0", "2 in all"]),
    ],
)
def test_refuses_bad_images(tiny_vae, images, words):
    with pytest.raises(InputError) as caught:
        tiny_vae.encode(images)
    for word in words:
        assert word in str(caught.value)


def test_refuses_bad_latents(tiny_vae):
    with pytest.raises(InputError, match="int32"):
        tiny_vae.decode(np.zeros((1, 4, 4, 4), np.int32))
    with pytest.raises(InputError, match="expected \\(batch, height, width, 4\\)"):
        tiny_vae.decode(np.zeros((1, 4, 4, 16), np.float32))
    latents = np.zeros((3, 4, 4, 4), np.float32)
    latents[1, 0, 0, 0] = np.inf
    with pytest.raises(InputError, match="index 1"):
        tiny_vae.decode(latents)


def test_a_nan_on_the_device_spoils_its_own_image_only(tiny_vae):
    images = random_images(2, 16, 16, 3)
    images[1, 0, 0, 0] = np.nan
    mean, _ = tiny_vae.encode(jnp.asarray(images))
    assert np.isfinite(mean[0]).all()
    assert np.isnan(mean[1]).all()


def test_refuses_bad_options(tiny_parameters):
    with pytest.raises(ConfigError, match="float16"):
        VAE(TINY, tiny_parameters, dtype="float16")
    with pytest.raises(ConfigError, match="axes x"):
        VAE(TINY, tiny_parameters, mesh=jax.make_mesh((1,), ("x",)))
    for tiling, word in [(Tiling(18, 4), "size=18"), (Tiling(16, 0), "overlap=0"), (Tiling(16, 16), "smaller")]:
        with pytest.raises(ConfigError, match=word):
            VAE(TINY, tiny_parameters, tiling=tiling)


@pytest.mark.parametrize("tiling", [None, Tiling(16, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_promotion(tiny_parameters, dtype, tiling):
    """Encoder and decoder can be traced under JAX's strict rules, which users turn on to find mistakes."""
    vae = VAE(TINY, tiny_parameters, dtype=dtype, tiling=tiling)
    images, latents = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"), jax.ShapeDtypeStruct((1, 8, 8, 4), "float32")
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert jax.eval_shape(vae._encode, vae.parameters, images)[0].shape == latents.shape
        assert jax.eval_shape(vae._decode, vae.parameters, latents).shape == images.shape


def test_strict_promotion_in_training():
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, 4))
    update = _make_update(TINY, optimizer, FrozenConfigDict({"seed": 0, "kl_weight": 1e-6}))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(lambda: _initial_state(TINY, optimizer, 0))
        after = jax.eval_shape(update, state, jax.ShapeDtypeStruct((2, 16, 16, 3), "float32"))
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, state)
