"""Published DiT and SiT weights: the isotropic baseline of the golden arrays, and its conventions."""

import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.errors import ConfigError, WeightsError
from mpdit_jax.model.presets import model_config
from tests.conftest import Golden, relative_error


@pytest.fixture(scope="module")
def golden():
    return Golden("dit_isotropic")


@pytest.fixture
def state(golden):
    return golden.group("state/")


def test_forward(golden, state):
    """The first half of the channels; the second is the variance that a velocity does not have."""
    model = mp.load_torch(state, num_heads=4, convention="sit")
    expected = golden.images("out")[..., :4]
    assert relative_error(model(golden.images("x"), golden["t"], golden["y"]), expected) <= 2e-5


def test_its_shape_is_read_off(state):
    config = mp.load_torch(state, num_heads=4, convention="dit").config
    assert (config.modulation, config.condition, config.time_embedding) == ("per_block", "vector", "sinusoidal")
    assert (config.patch_sizes, config.depths, config.hidden_size, config.input_size) == ((2,), (2,), 48, (8, 8))
    assert (config.in_channels, config.num_classes, config.convention) == (4, 10, "dit")


def test_round_trip(state):
    """Without the variance the way back is exact, and what was written needs no convention."""
    once = mp.to_torch(mp.load_torch(state, num_heads=4, convention="sit"))
    cut = ("final_layer.linear.weight", "final_layer.linear.bias")
    assert once.keys() == state.keys()
    for name, array in once.items():
        expected = state[name]
        if name in cut:
            expected = expected.reshape(4, 8, -1)[:, :4].reshape(array.shape)
        assert array.tobytes() == expected.tobytes(), name
    again = mp.load_torch(once, num_heads=4)
    assert again.config.convention == "velocity"
    assert all(array.tobytes() == once[name].tobytes() for name, array in mp.to_torch(again).items())


def test_the_convention_is_asked_for(state):
    with pytest.raises(WeightsError, match="say which by convention='dit' or 'sit'"):
        mp.load_torch(state, num_heads=4)
    with pytest.raises(WeightsError, match="convention='ddpm': expected one of velocity, sit, dit"):
        mp.load_torch(state, num_heads=4, convention="ddpm")
    mpdit = Golden("mpdit_two_level_fno").group("state/")
    with pytest.raises(WeightsError, match="convention='sit': state dict has an MPDiT's names"):
        mp.load_torch(mpdit, num_heads=4, convention="sit")


@pytest.mark.parametrize("damage", [None, lambda array: array[..., None], lambda array: np.concatenate([array] * 4)])
def test_one_damaged_entry_is_named_whichever_it_is(state, damage):
    for name, array in state.items():
        bad = {**state}
        if damage is None:
            del bad[name]
        else:
            bad[name] = damage(array)
        if name == "y_embedder.embedding_table.weight" and bad.get(name, array).shape == (44, 48):
            continue  # other classes
        with pytest.raises(WeightsError) as error:
            mp.load_torch(bad, num_heads=4, convention="sit")
        assert f"missing: {name}" in str(error.value) or f"{name} is {bad.get(name, array).shape} instead" in str(
            error.value
        )


def test_kinds_that_nobody_has_published(state):
    small = {"depths": (1,), "hidden_size": 16, "num_heads": 2, "num_classes": 3, "input_size": 8}
    for other in ({"modulation": "shared"}, {"condition": "tokens"}, {"time_embedding": "fno"}):
        model = mp.create_model("dit_b_2", **small, **other)
        with pytest.raises(ConfigError, match="has no published PyTorch names"):
            mp.to_torch(model)


@pytest.mark.parametrize(("preset", "parameters", "giga_macs"), [("dit_b_2", 130.5, 23.0), ("dit_xl_2", 675.1, 118.6)])
def test_the_presets_cost_what_is_printed(preset, parameters, giga_macs):
    count, macs = mp.count(model_config(preset))
    assert round(count / 1e6, 1) == parameters
    assert round(macs / 1e9, 1) == giga_macs


def test_conditioning_is_computed_apart(state, golden):
    model = mp.load_torch(state, num_heads=4, convention="sit")
    x, t, y = golden.images("x"), jnp.asarray(golden["t"]), jnp.asarray(golden["y"])
    parts = model.velocity(jnp.asarray(x), model.modulation(t), model.class_embedding(y))
    assert relative_error(parts, model(x, t, y)) == 0
    half = model.astype("bfloat16")
    assert half.class_embedding.table[...].dtype == jnp.float32
    assert half.levels[0].blocks.layers.modulation.linear.kernel[...].dtype == jnp.float32
    assert half.levels[0].blocks.layers.attention.qkv.kernel[...].dtype == jnp.bfloat16
    assert relative_error(half(x, t, y), model(x, t, y)) < 2e-2
