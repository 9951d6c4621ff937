import json

import pytest

from mpdit_jax import benchmark
from mpdit_jax.errors import ConfigError


@pytest.mark.slow
def test_shares_are_of_the_same_machines_product(capsys):
    assert benchmark.main(["train", "--preset=mpdit_b", "--batch=1", "--repeats=1", "--format=json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rate = result["peak_macs_per_second"]
    assert result["forward_share"] == pytest.approx(16.165e9 / result["seconds_forward"] / rate, rel=1e-3)
    assert result["step_share"] == pytest.approx(3 * 16.165e9 / result["seconds_step"] / rate, rel=1e-3)
    assert 0.02 < result["forward_share"] < 1.5
    assert result["seconds_step"] > result["seconds_forward"]


def test_cudnn_needs_a_gpu():
    with pytest.raises(ConfigError, match="--attention=cudnn needs an NVIDIA GPU"):
        benchmark.main(["train", "--attention=cudnn"])
