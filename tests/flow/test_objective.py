import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.flow.objective import LogitNormal, Uniform, interpolate
from mpdit_jax.train.step import drop_labels


def zero(x, t, y):
    return jnp.zeros_like(x)


def test_ends_of_the_path():
    x, noise = jnp.ones((2, 4, 4, 1)), jnp.full((2, 4, 4, 1), 3.0)
    z, velocity = interpolate(x, noise, jnp.array([0.0, 1.0]))
    assert (z[0] == x[0]).all()
    assert (z[1] == noise[1]).all()
    assert (velocity == 2).all()


def test_loss_of_the_zero_model():
    x, y = jnp.ones((2, 4, 4, 1)), jnp.zeros(2, jnp.int32)
    noise = jnp.stack([jnp.full((4, 4, 1), 3.0), jnp.full((4, 4, 1), 2.0)])
    loss, per_example = mp.flow_matching_loss(zero, x, y, t=jnp.array([0.3, 0.6]), noise=noise)
    assert per_example.tolist() == [4.0, 1.0]
    assert loss == 2.5


def test_time_and_noise_are_drawn_from_the_key_unless_given():
    x, y = jnp.ones((64, 4, 4, 1)), jnp.zeros(64, jnp.int32)
    a, b = (mp.flow_matching_loss(zero, x, y, key=jax.random.key(seed))[0] for seed in (0, 1))
    assert a != b
    assert a == mp.flow_matching_loss(zero, x, y, key=jax.random.key(0))[0]
    assert a == pytest.approx(2, rel=0.1)  # E|n - 1|² = 2
    noise = jnp.zeros_like(x)
    assert mp.flow_matching_loss(zero, x, y, key=jax.random.key(0), noise=noise)[0] == 1


def test_refusals():
    x, y = jnp.ones((2, 4, 4, 1)), jnp.zeros(2, jnp.int32)
    with pytest.raises(InputError, match="needs key="):
        mp.flow_matching_loss(zero, x, y, t=jnp.zeros(2))
    with pytest.raises(InputError, match=r"y \(3,\)"):
        mp.flow_matching_loss(zero, x, jnp.zeros(3, jnp.int32), key=jax.random.key(0))
    model = mp.create_model("mpdit_b", depths=(1, 1), hidden_size=16, num_heads=2, input_size=4, num_classes=3)
    with pytest.raises(InputError, match="label 99 is out of range"):
        mp.flow_matching_loss(model, np.zeros((2, 4, 4, 4)), [1, 99], key=jax.random.key(0))
    with pytest.raises(InputError, match=r"x ranges from 0 to 255: expected \[-1, 1\] .*give images / 127\.5 - 1"):
        mp.flow_matching_loss(model, np.arange(256).reshape(4, 4, 4, 4), [1] * 4, key=jax.random.key(0))
    with pytest.raises(InputError, match=r"x ranges from 0\.0 to 255\.0: .*give images / 127\.5 - 1"):
        mp.flow_matching_loss(model, jnp.arange(256.0).reshape(4, 4, 4, 4), [1] * 4, key=jax.random.key(0))
    with pytest.raises(ConfigError, match="std=0"):
        LogitNormal(0.0, 0.0)


def test_time_distributions():
    logits = np.asarray(jax.scipy.special.logit(LogitNormal(0.5, 2.0).sample(jax.random.key(0), 20_000)))
    assert logits.mean() == pytest.approx(0.5, abs=0.06)
    assert logits.std() == pytest.approx(2.0, abs=0.05)
    t = np.asarray(Uniform().sample(jax.random.key(0), 20_000))
    assert np.quantile(t, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.02)


def test_label_dropout():
    labels = jnp.arange(10_000) % 10
    dropped = drop_labels(jax.random.key(0), labels, 0.1, 10)
    assert (dropped == 10).mean() == pytest.approx(0.1, abs=0.01)
    assert ((dropped == labels) | (dropped == 10)).all()
    assert (drop_labels(jax.random.key(0), labels, 0.0, 10) == labels).all()
