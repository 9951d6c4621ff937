"""The initialization has the measured moments of a PyTorch mpdit_b."""

import json
import re

import numpy as np
import pytest

import mpdit_jax as mp
from tests.conftest import GOLDEN

STATISTICS = json.loads((GOLDEN / "init_statistics_mpdit_b.json").read_text())


@pytest.fixture(scope="module")
def state():
    return mp.to_torch(mp.create_model("mpdit_b", seed=0))


def test_no_parameter_is_left_out(state):
    """The file has every kind of parameter, for some blocks of each level."""
    kinds = ({re.sub(r"blocks\.\d+", "blocks.N", name) for name in names} for names in (state, STATISTICS))
    assert next(kinds) == next(kinds)


@pytest.mark.parametrize("name", STATISTICS)
def test_matches_published_moments(state, name):
    expected, array = STATISTICS[name], state[name].astype(np.float64)
    assert list(array.shape) == expected["shape"]
    if expected["std"] == 0:
        assert not np.any(array)
        return
    if name.startswith("pos_embed"):
        found = {"mean": array.mean(), "std": array.std(ddof=1), "min": array.min(), "max": array.max()}
        assert found == pytest.approx({moment: expected[moment] for moment in found}, abs=2e-6)
        return
    # Two independent draws of n numbers: each mean is off by std/√n, each std by about std/√(2n) (less if uniform).
    std, size = expected["std"], array.size
    assert abs(array.mean() - expected["mean"]) <= 5 * std * np.sqrt(2 / size) + 1e-6
    assert abs(array.std() - std) <= 5 * std * np.sqrt(1 / size) + 1e-6
    uniform = expected["max"] <= 1.9 * std
    if uniform:
        bound = np.sqrt(3) * std
        # The gap between the largest of n uniform numbers and the bound is about 2 bound / n.
        for extreme in (array.max(), -array.min(), expected["max"], -expected["min"]):
            assert bound * (1 - 30 / size) - 5 * std / np.sqrt(size) <= extreme <= bound * (1 + 5 / np.sqrt(size))
    else:
        assert 0.75 <= array.max() / expected["max"] <= 1.35
        assert 0.75 <= array.min() / expected["min"] <= 1.35


def test_every_layer_is_drawn_on_its_own(state):
    first, second = (state[f"downsample_blocks.{layer}.mlp.fc1.weight"] for layer in (0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(state["upsample_blocks.0.attn.proj.weight"], state["linear_skip.weight"])


def test_seed_decides(state):
    same, other = (mp.to_torch(mp.create_model("mpdit_b", depths=(1, 1), seed=seed)) for seed in (0, 1))
    again = mp.to_torch(mp.create_model("mpdit_b", depths=(1, 1), seed=0))
    name = "x_embedder.proj.weight"
    assert np.array_equal(same[name], again[name])
    assert not np.array_equal(same[name], other[name])
