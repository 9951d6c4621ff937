import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.model.parameters import abstract, merge, split
from mpdit_jax.model.presets import preset_config

# Millions of parameters as the published table prints them.
PRINTED = {
    "mpdit_b": "104.85",
    "mpdit_l": "331.77",
    "mpdit_xl": "481.21",
    "mpdit3_b": "109.4",
    "mpdit3_l": "339.4",
    "mpdit3_xl": "490.7",
    "mpdit3_xl_paper": "491",
    "dit_s_2": "33",
    "dit_b_2": "130.5",
    "dit_l_2": "458",
    "dit_xl_2": "675",
}
GIGA_MACS = {"mpdit_b": 16.15, "mpdit_l": 40.6, "mpdit_xl": 56.4, "dit_b_2": 23.0, "dit_xl_2": 118.66}
SMALL = {"hidden_size": 64, "num_heads": 4, "num_classes": 10}


def test_every_preset_has_a_printed_figure():
    coarser = {f"dit_{size}_{patch}" for size in ("s", "b", "l", "xl") for patch in (4, 8)}
    assert set(mp.presets()) == set(PRINTED) | coarser


@pytest.mark.parametrize("preset", PRINTED)
def test_parameter_counts_match_the_table(preset):
    decimals = len(PRINTED[preset].partition(".")[2])
    parameters, _ = mp.count(preset_config(preset))
    assert f"{parameters / 1e6:.{decimals}f}" == PRINTED[preset]


@pytest.mark.parametrize("preset", GIGA_MACS)
def test_macs_are_near_the_table(preset):
    _, macs = mp.count(preset_config(preset))
    assert macs / 1e9 == pytest.approx(GIGA_MACS[preset], abs=0.05)


@pytest.mark.parametrize("fields", [
    {"patch_sizes": (4, 2), "depths": (2, 1), "input_size": (8, 16)},
    {"patch_sizes": (8, 4, 2), "depths": (1, 1, 2), "input_size": 16, "time_embedding": "sinusoidal"},
    {"patch_sizes": (2,), "depths": (3,), "input_size": 8, "class_tokens": 1},
    {"patch_sizes": (4, 2), "depths": (1, 1), "input_size": 8, "skip": False, "mlp_ratio": 3.0, "fno_layers": 2},
    {"patch_sizes": (2,), "depths": (3,), "input_size": 8, "condition": "vector", "modulation": "per_block"},
    {"patch_sizes": (4, 2), "depths": (2, 1), "input_size": 8, "condition": "vector"},
    {"patch_sizes": (4, 2), "depths": (2, 1), "input_size": 8, "modulation": "per_block"},
])  # fmt: skip
def test_parameters_are_those_of_the_model(fields):
    config = preset_config("mpdit_b", **SMALL, **fields)
    model = mp.create_model("mpdit_b", **SMALL, **fields)
    tables = sum(int(np.prod(config.grid(level))) * config.hidden_size for level in range(len(config.depths)))
    trained = sum(leaf.size for leaf in split(model)[1].values())
    assert mp.count(model)[0] == mp.count(config)[0] == trained + tables


@pytest.mark.parametrize("fields", [
    {},
    {"time_embedding": "sinusoidal"},
    {"time_embedding": "sinusoidal", "condition": "vector", "modulation": "per_block"},
])  # fmt: skip
def test_macs_are_what_xla_counts(fields):
    """XLA counts a loop's body once, so the model has one block per level and no loop over heads. The tolerance of 1 %
    is for norms and activations, which XLA counts too.
    """
    one_block = {"depths": (1, 1), "hidden_size": 768, "num_classes": 10, "input_size": 32, "platform": "tpu"}
    config = preset_config("mpdit_b", **one_block, **fields)
    structure, shapes = abstract(config)
    batch = 4
    x = jax.ShapeDtypeStruct((batch, 32, 32, 4), jnp.float32)
    t, y = jax.ShapeDtypeStruct((batch,), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    lowered = jax.jit(lambda p, x, t, y: merge(structure, p)(x, t, y)).lower(shapes, x, t, y)
    flops = lowered.cost_analysis()["flops"]
    assert flops == pytest.approx(2 * batch * mp.count(config)[1], rel=0.01)
