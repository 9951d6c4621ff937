"""DiT and SiT as velocities, against stepping them in their own terms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.flow.protocols import Castable, Factored
from tests.conftest import Golden, relative_error


def load(convention):
    return mp.load_torch(Golden("dit_isotropic").group("state/"), num_heads=4, convention=convention)


def test_euler_on_a_dit_is_ddim():
    """x_k = √ᾱ x + √(1 − ᾱ) n stepped deterministically in numpy; z is x_k scaled to the linear path."""
    model = load("dit")
    velocity, labels = mp.as_velocity(model), np.array([3, 7])
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha, sigma = np.sqrt(np.cumprod(1 - betas)), np.sqrt(1 - np.cumprod(1 - betas))
    steps = [999, 900, 640, 333, 120, 40, 3]
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4))
    z = x / (alpha[999] + sigma[999])
    for now, then in itertools.pairwise(steps):
        noise = np.asarray(model(x.astype(np.float32), np.full(2, now, np.float32), labels), np.float64)
        data = (x - sigma[now] * noise) / alpha[now]
        x = alpha[then] * data + sigma[then] * noise
        t, u = (sigma[step] / (alpha[step] + sigma[step]) for step in (now, then))
        z = z + (u - t) * np.asarray(velocity(z.astype(np.float32), np.full(2, t, np.float32), labels), np.float64)
        assert relative_error(z * (alpha[then] + sigma[then]), x) < 2e-4


def test_a_sit_runs_from_noise_to_data():
    model = load("sit")
    velocity, x = mp.as_velocity(model), np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
    t, labels = np.array([0.1, 0.5, 1.0], np.float32), np.array([0, 4, 10])
    assert relative_error(velocity(x, t, labels), -np.asarray(model(x, 1 - t, labels))) == 0


@pytest.mark.parametrize("convention", ["dit", "sit"])
def test_samplers_take_the_converted_model_and_refuse_the_other(convention):
    model, key = load(convention), jax.random.key(0)
    sampler = mp.make_sampler(steps=4, guidance_scale=2.0)
    with pytest.raises(InputError, match=rf"convention is '{convention}': expected 'velocity'.*as_velocity"):
        sampler(model, [1, 2], key)
    with pytest.raises(InputError, match=rf"convention is '{convention}'"):
        mp.flow_matching_loss(model, np.zeros((2, 8, 8, 4)), np.array([3, 7]), key=key)
    converted = mp.as_velocity(model)
    assert isinstance(converted, Factored)
    assert isinstance(converted, Castable)
    latents = sampler(converted, [1, 2], key)
    assert np.isfinite(latents).all()
    # From pure noise at t = 1 through the null class as well, as an Euler loop over the plain call does.
    noise = np.random.default_rng(1).normal(size=latents.shape).astype(np.float32)
    z, null = jnp.asarray(noise), jnp.full(2, model.num_classes)
    for t in np.linspace(1, 0, 5)[:-1]:
        times = jnp.full(2, t, jnp.float32)
        worse, better = converted(z, times, null), converted(z, times, jnp.array([1, 2]))
        z = z - 0.25 * (worse + 2 * (better - worse))
    assert relative_error(sampler(converted, [1, 2], key, noise=noise), z) < 1e-5


def test_a_velocity_is_returned_as_it_is():
    model = mp.create_model("dit_b_2", depths=(1,), hidden_size=16, num_heads=2, num_classes=3, input_size=8)
    assert mp.as_velocity(model) is model
    with pytest.raises(InputError, match="expected a model from load_torch"):
        mp.as_velocity("dit")


def test_only_velocities_are_trained():
    from mpdit_jax.config import base_config, resolve

    config = base_config()
    config.model.preset, config.model.convention = "dit_b_2", "dit"
    with pytest.raises(ConfigError, match=r"config\.model\.convention='dit': expected velocity"):
        resolve(config)
