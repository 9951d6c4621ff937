"""Published DiT and SiT weights, against the golden arrays of the isotropic baseline."""

import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.errors import ConfigError, WeightsError
from mpdit_jax.model.parameters import abstract, merge
from mpdit_jax.model.presets import preset_config
from tests.conftest import Golden, relative_error


@pytest.fixture(scope="module")
def golden():
    return Golden("dit_isotropic")


@pytest.fixture
def state(golden):
    return golden.group("state/")


def test_forward(golden, state):
    """Compare the first half of the golden channels; the second half is the learned variance."""
    model = mp.load_torch(state, num_heads=4, convention="sit")
    expected = golden.images("out")[..., :4]
    assert relative_error(model(golden.images("x"), golden["t"], golden["y"]), expected) <= 2e-5


def test_the_config_is_inferred(state):
    config = mp.load_torch(state, num_heads=4, convention="dit").config
    assert (config.modulation, config.condition, config.time_embedding) == ("per_block", "vector", "sinusoidal")
    assert (config.patch_sizes, config.depths, config.hidden_size, config.input_size) == ((2,), (2,), 48, (8, 8))
    assert (config.in_channels, config.num_classes, config.convention) == (4, 10, "dit")


def test_round_trip(state):
    """All weights but the variance are returned bit for bit, and the convention is required again."""
    once = mp.to_torch(mp.load_torch(state, num_heads=4, convention="sit"))
    cut = ("final_layer.linear.weight", "final_layer.linear.bias")
    assert once.keys() == state.keys()
    for name, array in once.items():
        expected = state[name]
        if name in cut:
            expected = expected.reshape(4, 8, -1)[:, :4].reshape(array.shape)
        assert array.tobytes() == expected.tobytes(), name
    with pytest.raises(WeightsError, match="say which by convention='dit', 'sit' or 'velocity'"):
        mp.load_torch(once, num_heads=4)
    again = mp.load_torch(once, num_heads=4, convention="sit")
    assert again.config == mp.load_torch(state, num_heads=4, convention="sit").config
    assert all(array.tobytes() == once[name].tobytes() for name, array in mp.to_torch(again).items())


def test_the_convention_is_required(state):
    with pytest.raises(WeightsError, match="say which by convention='dit', 'sit' or 'velocity'"):
        mp.load_torch(state, num_heads=4)
    with pytest.raises(WeightsError, match="convention='ddpm': expected one of velocity, sit, dit"):
        mp.load_torch(state, num_heads=4, convention="ddpm")
    mpdit = Golden("mpdit_two_level_fno").group("state/")
    with pytest.raises(WeightsError, match="convention='sit': state dict has an MPDiT's names, which is a velocity"):
        mp.load_torch(mpdit, num_heads=4, convention="sit")


def test_what_is_no_dit_is_not_called_an_mpdit(state):
    for other, entries in (({}, "0 entries, such as none"), ({"conv.weight": np.zeros(3)}, "1 entries, such as conv")):
        with pytest.raises(WeightsError, match=rf"convention='sit': state dict has {entries}.*expected a DiT's names"):
            mp.load_torch(other, convention="sit")
    # The prefixes of DataParallel and torch.compile are removed.
    wrapped = {f"module._orig_mod.{name}": array for name, array in state.items()}
    assert mp.load_torch(wrapped, num_heads=4, convention="dit").config.hidden_size == 48


def test_a_variance_in_the_weight_alone_is_misshapen(state):
    bias = state["final_layer.linear.bias"].reshape(4, 8)[:, :4].reshape(-1)
    with pytest.raises(WeightsError, match=r"final_layer\.linear\.weight is \(32, 48\) instead of \(16, 48\)"):
        mp.load_torch({**state, "final_layer.linear.bias": bias}, num_heads=4, convention="sit")


def test_a_wrong_position_table_is_named(state):
    with pytest.raises(WeightsError) as error:
        mp.load_torch({**state, "pos_embed": state["pos_embed"] + 1e-2}, num_heads=4, convention="sit")
    assert "): not the fixed sin-cos position table: pos_embed. Expected the published DiT names" in str(error.value)


def test_the_config_survives_to_torch_and_load_torch():
    small = {"depths": (1,), "hidden_size": 16, "num_heads": 2, "num_classes": 3, "input_size": 8}
    structure, shapes = abstract(preset_config("dit_b_2", **small))
    model = merge(structure, {name: jnp.zeros(leaf.shape) for name, leaf in shapes.items()})
    assert mp.load_torch(mp.to_torch(model), num_heads=2, convention="velocity").config == model.config


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


def test_models_without_published_names_are_refused(state):
    small = {"depths": (1,), "hidden_size": 16, "num_heads": 2, "num_classes": 3, "input_size": 8}
    for other in ({"modulation": "shared"}, {"condition": "tokens"}, {"time_embedding": "fno"}):
        model = mp.create_model("dit_b_2", **small, **other)
        with pytest.raises(ConfigError, match="has no published PyTorch names"):
            mp.to_torch(model)


@pytest.mark.parametrize(("preset", "parameters", "giga_macs"), [("dit_b_2", 130.5, 23.0), ("dit_xl_2", 675.1, 118.6)])
def test_the_presets_have_the_published_cost(preset, parameters, giga_macs):
    count, macs = mp.count(preset_config(preset))
    assert round(count / 1e6, 1) == parameters
    assert round(macs / 1e9, 1) == giga_macs


def test_a_call_is_the_composition_of_its_parts(state, golden):
    model = mp.load_torch(state, num_heads=4, convention="sit")
    x, t, y = golden.images("x"), jnp.asarray(golden["t"]), jnp.asarray(golden["y"])
    parts = model.velocity(jnp.asarray(x), model.modulation(t), model.class_embedding(y))
    assert relative_error(parts, model(x, t, y)) == 0
    half = model.astype("bfloat16")
    assert half.class_embedding.table[...].dtype == jnp.float32
    assert half.levels[0].blocks.layers.modulation.linear.kernel[...].dtype == jnp.float32
    assert half.levels[0].blocks.layers.attention.qkv.kernel[...].dtype == jnp.bfloat16
    assert relative_error(half(x, t, y), model(x, t, y)) < 2e-2
