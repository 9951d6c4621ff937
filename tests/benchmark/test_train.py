import json

import pytest

import mpdit_jax as mp
from mpdit_jax.benchmark import __main__ as benchmark
from mpdit_jax.errors import ConfigError
from mpdit_jax.model.presets import PRESETS, preset_config


@pytest.mark.slow
def test_shares_are_of_the_same_machines_product(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "mpdit_b", PRESETS["mpdit_b"] | {"depths": (1, 1)})
    _, macs = mp.count(preset_config("mpdit_b"))
    assert benchmark.main(["train", "--preset=mpdit_b", "--batch=1", "--repeats=1", "--format=json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rate = result["peak_macs_per_second"]
    assert result["forward_share"] == pytest.approx(macs / result["seconds_forward"] / rate, rel=1e-3)
    assert result["step_share"] == pytest.approx(3 * macs / result["seconds_step"] / rate, rel=1e-3)
    assert 0.02 < result["forward_share"] < 1.5
    assert result["seconds_step"] > result["seconds_forward"]


def test_cudnn_needs_a_gpu():
    with pytest.raises(ConfigError, match="--attention=cudnn needs an NVIDIA GPU"):
        benchmark.main(["train", "--attention=cudnn"])
