"""DiT and SiT as velocities, compared with sampling in their own conventions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpdit_jax as mp
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.flow.protocols import Castable, Factored
from tests.conftest import Golden, relative_error


def load(convention):
    return mp.load_torch(Golden("dit_isotropic").group("state/"), num_heads=4, convention=convention)


def test_euler_on_a_dit_is_ddim():
    """Compare with deterministic DDIM steps of x_k = √ᾱ x + √(1 − ᾱ) n in numpy; z is x_k scaled to the linear path."""
    model = load("dit")
    velocity, labels = mp.as_velocity(model), np.array([3, 7])
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha, sigma = np.sqrt(np.cumprod(1 - betas)), np.sqrt(1 - np.cumprod(1 - betas))
    steps = [999, 900, 640, 333, 120, 40, 3, 0]
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4))
    z = x / (alpha[999] + sigma[999])
    for now, then in itertools.pairwise(steps):
        noise = np.asarray(model(x.astype(np.float32), np.full(2, now, np.float32), labels), np.float64)
        data = (x - sigma[now] * noise) / alpha[now]
        x = alpha[then] * data + sigma[then] * noise
        t, u = (sigma[step] / (alpha[step] + sigma[step]) for step in (now, then))
        z = z + (u - t) * np.asarray(velocity(z.astype(np.float32), np.full(2, t, np.float32), labels), np.float64)
        assert relative_error(z * (alpha[then] + sigma[then]), x) < 2e-4


def test_both_ends_of_the_path_use_dits_first_and_last_step():
    """The velocity is ε − x, with ε of step 999 at t = 1 and of step 0 at t below that step's."""
    model, labels = load("dit"), np.array([3, 7])
    velocity, z = mp.as_velocity(model), np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    noise = np.asarray(model(z, np.full(2, 999, np.float32), labels))
    data = (z - np.sqrt(1 - bars[999]) * noise) / np.sqrt(bars[999])
    assert relative_error(velocity(z, np.ones(2, np.float32), labels), noise - data) < 1e-4
    for t in (0.0, 0.004, 0.0095):
        unit = (z / np.hypot(t, 1 - t)).astype(np.float32)
        noise = np.asarray(model(unit, np.zeros(2, np.float32), labels))
        data = (z - t * noise) / (1 - t)
        assert relative_error(velocity(z, np.full(2, t, np.float32), labels), noise - data) < 1e-5


class GaussianDiT(nnx.Module):
    """A DiT with the exact ε for data of mean 0 and variance 1, which is √(1 − ᾱ_k) x_k."""

    input_shape, num_classes, convention, config = (1, 1, 1), 1, "dit", None

    def check(self, x, t, y):
        return jnp.asarray(x), jnp.asarray(t), jnp.asarray(y)

    def modulation(self, t):
        bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        return jnp.interp(t, np.arange(1000.0), np.sqrt(1 - bars))

    def class_embedding(self, y):
        return y

    def velocity(self, x, modulation, class_embedding):
        return modulation[:, None, None, None] * x

    def __call__(self, x, t, y):
        return self.velocity(x, self.modulation(t), y)

    def astype(self, dtype):
        return self

    def for_platform(self, platform):
        return self


def test_a_dit_with_the_exact_noise_has_the_exact_velocity():
    """Except for t below 0.01, where the error is the one that DiTVelocity's docstring gives."""
    t = np.array([0.0, 0.005, 0.01, 0.1, 0.5, 0.9, 0.99], np.float32)
    z = np.full((7, 1, 1, 1), 0.7, np.float32)
    found = np.asarray(mp.as_velocity(GaussianDiT())(z, t, np.zeros(7, int))).reshape(-1)
    exact = 0.7 * (2 * t - 1) / ((1 - t) ** 2 + t**2)  # E[n − x | z_t = z]
    error = np.abs(found - exact) / 0.7
    assert error[2:].max() < 4e-5
    assert 0.0095 < error[0] < 0.0105
    assert 0.0045 < error[1] < 0.0055


def test_a_sit_is_stepped_in_its_own_direction():
    """SiT's time rises from noise (0) to data (1), and its prediction is added to x."""
    model, labels = load("sit"), np.array([4, 10])
    noise = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    x = noise.astype(np.float64)
    for time in np.arange(6) / 6:
        x = x + np.asarray(model(x.astype(np.float32), np.full(2, time, np.float32), labels)) / 6
    sampler = mp.make_sampler(solver="euler", steps=6)
    assert relative_error(sampler(mp.as_velocity(model), labels, jax.random.key(0), noise=noise), x) < 1e-5


def test_a_converted_model_is_a_model():
    """It checks its arguments, converts to itself, and has the same cost as the wrapped model."""
    model = load("sit")
    converted, x, t = mp.as_velocity(model), np.zeros((1, 8, 8, 4), np.float32), np.zeros(1, np.float32)
    with pytest.raises(InputError, match="label 99 is out of range: this model has classes 0 to 9"):
        converted(x, t, np.array([99]))
    with pytest.raises(InputError, match=r"this model takes x \(B, 8, 8, 4\)"):
        converted(x[..., :3], t, np.array([1]))
    assert mp.as_velocity(converted) is converted
    assert mp.count(converted) == mp.count(model)
    with pytest.raises(InputError, match="model=SiTVelocity: expected a model from load_torch or create_model itself"):
        mp.to_torch(converted)
    with pytest.raises(InputError, match="model=str: expected a model or a ModelConfig"):
        mp.count("mpdit_b")


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
    # The sampler agrees with a guided Euler loop over plain calls.
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
