"""Masked training of an isotropic model: the trunk's tokens, repeatability, cost and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpdit_jax.config import base_config, model_config, resolve
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import ConfigError
from mpdit_jax.model.accounting import count_macs, masked_macs, training_flops
from mpdit_jax.model.masking import draw_kept, kept_tokens, masked_velocity, split_error
from mpdit_jax.model.parameters import abstract, merge
from mpdit_jax.model.presets import preset_config
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state, create_state
from mpdit_jax.train.step import jit_step, make_loss, make_noising, make_step

FIELDS = {"patch_sizes": (2,), "depths": (3,), "hidden_size": 16, "num_heads": 2, "input_size": (8, 8)}
FIELDS |= {"in_channels": 1, "num_classes": 3, "class_tokens": 2, "time_embedding": "sinusoidal", "decoder_depth": 1}
MODEL = preset_config("mpdit_b", **FIELDS)


@pytest.fixture(scope="module")
def model():
    structure, shapes = abstract(MODEL)
    random = np.random.default_rng(0)
    return merge(structure, {k: jnp.asarray(random.normal(0, 0.3, s.shape), jnp.float32) for k, s in shapes.items()})


@pytest.fixture(scope="module")
def inputs():
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 1), np.float32)
    return jnp.asarray(x), jnp.array([0.3, 0.8]), jnp.array([0, 3])


def test_with_every_token_kept_it_is_the_model(model, inputs):
    kept = jnp.broadcast_to(jnp.arange(16), (2, 16))
    np.testing.assert_allclose(masked_velocity(model, *inputs, kept), model(*inputs), atol=2e-5)


def test_hidden_tokens_change_nothing_and_kept_ones_do(model, inputs):
    x, t, y = inputs
    kept = draw_kept(jax.random.key(0), MODEL, 0.75, 2)
    before = masked_velocity(model, x, t, y, kept)
    patches = np.zeros((2, 16), bool)
    np.put_along_axis(patches, np.asarray(kept), True, axis=1)
    seen = np.kron(patches.reshape(2, 4, 4), np.ones((2, 2), bool))[..., None]  # (B, 8, 8, 1)
    np.testing.assert_array_equal(masked_velocity(model, jnp.where(seen, x, 9.0), t, y, kept), before)
    assert np.abs(masked_velocity(model, jnp.where(seen, 9.0, x), t, y, kept) - before).max() > 0.1


def test_the_trunk_gathers(model, inputs):
    """The trunk is compiled for the kept tokens alone, and does not mask hidden ones."""
    kept = draw_kept(jax.random.key(0), MODEL, 0.75, 2)
    program = jax.jit(lambda *a: masked_velocity(model, *a)).lower(*inputs, kept).as_text()
    assert f"2x{2 + 4}x16xf32" in program  # the trunk: class tokens and a quarter of 16
    assert f"2x{2 + 16}x16xf32" in program  # the decoder


def test_which_tokens_is_a_function_of_the_key():
    first, again, other = (draw_kept(jax.random.key(seed), MODEL, 0.75, 64) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    assert first.shape == (64, 4)
    assert all(len(set(row)) == 4 for row in np.asarray(first).tolist())
    assert np.bincount(np.asarray(first).ravel(), minlength=16).min() > 4  # of 16 expected each
    assert [kept_tokens(MODEL, ratio) for ratio in (0.0, 0.5, 0.75, 0.999)] == [16, 8, 4, 1]


def test_the_error_is_told_apart():
    squares = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
    kept = np.array([[0, 3, 15], [1, 2, 8]])
    seen, hidden = split_error(jnp.asarray(squares), jnp.asarray(kept), 2)
    patches = squares.reshape(2, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(2, 16, 4).mean(-1)
    for row in range(2):
        assert seen[row] == pytest.approx(patches[row, kept[row]].mean(), rel=1e-5)
        assert hidden[row] == pytest.approx(np.delete(patches[row], kept[row]).mean(), rel=1e-5)


def config_of(**changes):
    config = base_config()
    config.batch_size, config.mask_ratio = 8, 0.75
    config.model.update(FIELDS)
    config.update(changes)
    return config


@pytest.mark.slow
def test_a_masked_step_is_repeatable_and_reaches_the_mask_token():
    config = resolve(config_of())
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), make_optimizer(config.optimizer)
    target = abstract_state(MODEL, optimizer, mesh)
    random = np.random.default_rng(0)
    batch = {"x": random.standard_normal((8, 8, 8, 1), np.float32), "y": random.integers(0, 3, 8, np.int32)}
    step = make_step(make_noising(config), make_loss(abstract(MODEL)[0], 0.1), optimizer, 0.9, accumulation=2)
    update, ends = jit_step(step, target, mesh), []
    for _ in range(2):
        state = create_state(MODEL, optimizer, target, 0)
        start = np.asarray(state.parameters["mask_token"])
        for _ in range(4):  # the final layer and the gates start at zero
            state = update(state, batch)
        ends.append(jax.device_get(state.parameters))
    assert (ends[0]["mask_token"] != start).all()
    for name, array in ends[0].items():
        np.testing.assert_array_equal(ends[1][name], array)


def test_its_cost_is_what_xla_counts():
    """XLA counts a scan's body once: one block before and one after. At DiT-B's width both counts agree to 1 %."""
    config = preset_config("dit_b_2", depths=(2,), decoder_depth=1, num_classes=10, platform="gpu")
    structure, shapes = abstract(config)
    kept = jax.ShapeDtypeStruct((2, kept_tokens(config, 0.75)), jnp.int32)
    x, t = jax.ShapeDtypeStruct((2, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    lowered = jax.jit(lambda p, x, t, y, kept: masked_velocity(merge(structure, p), x, t, y, kept)).lower(
        shapes, x, t, jax.ShapeDtypeStruct((2,), jnp.int32), kept
    )
    assert lowered.cost_analysis()["flops"] == pytest.approx(4 * masked_macs(config, 0.75), rel=0.01)
    assert training_flops(config, 0.75) == 6 * masked_macs(config, 0.75) < 0.7 * 6 * count_macs(config)
    assert masked_macs(config, 0.0) == count_macs(config)


@pytest.mark.parametrize(("changes", "fields", "message"), [
    ({"mask_ratio": 1.0}, {}, "config.mask_ratio=1.0: expected at least 0 and below 1"),
    ({"mask_ratio": -0.5}, {}, "config.mask_ratio=-0.5: expected at least 0 and below 1"),
    ({"mask_loss_weight": -1.0}, {}, "config.mask_loss_weight=-1.0: expected 0 or more"),
    ({}, {"decoder_depth": 0}, "mask_ratio=0.75 with config.model.decoder_depth=0: set both for masked training"),
    ({"mask_ratio": 0.0}, {}, "mask_ratio=0.0 with config.model.decoder_depth=1"),
    ({}, {"patch_sizes": (4, 2), "depths": (2, 1)}, "random masking is for isotropic models"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, fields, message):
    config = config_of(**changes)
    config.model.update(fields)
    with pytest.raises(ConfigError, match=message):
        resolve(config)


def test_what_is_drawn_does_not_depend_on_masking():
    """Noise and times are the same with and without masking, so that runs can be compared."""
    batch = {"x": jnp.zeros((8, 8, 8, 1)), "y": jnp.zeros(8, jnp.int32)}
    plain = config_of(mask_ratio=0.0)
    plain.model.decoder_depth = 0
    drawn = [make_noising(resolve(config))(batch, jax.random.key(0)) for config in (config_of(), plain)]
    assert drawn[1].kept is None
    assert model_config(resolve(plain)).decoder_depth == 0
    for name in ("x", "y", "t", "noise"):
        np.testing.assert_array_equal(getattr(drawn[0], name), getattr(drawn[1], name))
