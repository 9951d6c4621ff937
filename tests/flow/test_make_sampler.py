import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.flow.solvers import Euler
from tests.conftest import relative_error

SMALL = {
    "depths": (1, 1), "hidden_size": 16, "num_heads": 2, "num_classes": 4, "class_tokens": 1, "input_size": (8, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    from mpdit_jax.model.parameters import merge, split

    structure, parameters = split(mp.create_model("mpdit_b", **SMALL))
    keys = dict(zip(parameters, jax.random.split(jax.random.key(1), len(parameters)), strict=True))
    return merge(structure, {k: v + 0.05 * jax.random.normal(keys[k], v.shape) for k, v in parameters.items()})


@pytest.mark.slow
def test_steps_counts_evaluations(model):
    """`steps=4` agrees with four Euler updates in a loop."""
    z = jax.random.normal(jax.random.key(3), (2, 8, 4, 4))
    labels = jnp.array([1, 3])
    found = mp.make_sampler(steps=4)(model, labels, jax.random.key(0), noise=z)
    for t in (1.0, 0.75, 0.5, 0.25):
        z = z - 0.25 * model(z, jnp.full(2, t), labels)
    assert relative_error(found, z) < 1e-5


def test_guidance_one_is_the_conditional_model_and_zero_the_null(model):
    key, labels = jax.random.key(0), jnp.array([0, 2, 3])
    plain = mp.make_sampler(steps=3)(model, labels, key)
    nearly = mp.make_sampler(steps=3, guidance_scale=1 + 1e-6)(model, labels, key)
    assert relative_error(nearly, plain) < 1e-4
    null = mp.make_sampler(steps=3)(model, jnp.full(3, model.num_classes), key)
    zero = mp.make_sampler(steps=3, guidance_scale=0.0)(model, labels, key)
    assert relative_error(zero, null) < 1e-4
    assert relative_error(plain, null) > 1e-3


class Rising:
    def times(self, intervals):
        return np.linspace(0, 1, intervals + 1)


class Short:
    def times(self, intervals):
        return np.linspace(1, 0, intervals)


@dataclasses.dataclass
class NotFrozen:
    def solve(self, *arguments):
        return Euler().solve(*arguments)


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({"time_grid": None}, "time_grid=None: expected one of uniform, shifted"),
    ({"time_grid": Rising(), "steps": 2}, "expected 3 falling times from 1 to 0"),
    ({"time_grid": Short(), "steps": 2}, "expected 3 falling times from 1 to 0"),
    ({"solver": "dopri5", "rtol": "a"}, "rtol='a': expected a small positive number"),
    ({"solver": "dopri5", "rtol": True}, "rtol=True"),
    ({"solver": "euler_maruyama", "norm": "x"}, "diffusion_norm='x': expected a number"),
    ({"solver": NotFrozen()}, "is not hashable .*: make it a frozen dataclass"),
    ({"guidance_scale": [[1.0, 2.0]]}, r"shape \(1, 2\): expected one number, or one for each label\.$"),
    ({"steps": 0}, "steps=0"),
    ({"steps": 2.0}, r"steps=2\.0"),
    ({"guidance_scale": -0.5}, r"guidance_scale=-0\.5"),
    ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
    ({"solver": "eulre"}, "did you mean 'euler'"),
    ({"solver": None}, "solver=None: expected one of euler"),
])  # fmt: skip
def test_impossible_settings(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        mp.make_sampler(**arguments)


@pytest.mark.parametrize(("labels", "sentence"), [
    ([0, 5], "label 5 is out of range"),
    ([-1], "label -1 is out of range"),
    ([0.5], "whole numbers"),
    ([[1]], "whole numbers"),
])  # fmt: skip
def test_labels_are_checked(model, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        mp.make_sampler(steps=1)(model, np.array(labels), jax.random.key(0))


def test_noise_of_another_shape(model):
    with pytest.raises(InputError, match=r"expected \(1, 8, 4, 4\)"):
        mp.make_sampler(steps=1)(model, np.array([0]), jax.random.key(0), noise=jnp.zeros((1, 4, 8, 4)))


def test_a_key_must_be_a_random_key(model):
    noise = np.zeros((1, *model.input_shape), np.float32)
    for key in (None, 0):
        with pytest.raises(InputError, match=f"key={key}: expected a random key"):
            mp.make_sampler(steps=2)(model, [1], key, noise=noise)


def test_unused_arguments_are_refused(model):
    with pytest.raises(InputError, match=r"increments are given and Euler\(\) adds no noise"):
        mp.make_sampler(steps=2)(model, [1], jax.random.key(0), increments=np.zeros((1, 1, *model.input_shape)))
    with pytest.raises(InputError, match=r"negative_labels=\{3\}: expected one for each label"):
        mp.make_sampler(steps=2)(model, [1], jax.random.key(0), negative_labels={3})
