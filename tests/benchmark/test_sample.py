"""`python -m mpdit_jax.benchmark sample` prints what its help promises."""

import json

import pytest

import mpdit_jax as mp
from mpdit_jax.benchmark.__main__ import main


def test_unknown_preset_is_refused():
    with pytest.raises(mp.MPDiTError, match="unknown preset 'mpdit_z'"):
        main(["sample", "--preset=mpdit_z"])


def test_a_solver_that_chooses_its_steps_is_refused():
    with pytest.raises(mp.MPDiTError, match="--solver=dopri5: it takes as many steps as it needs"):
        main(["sample", "--solver=dopri5"])


@pytest.mark.slow
def test_benchmark(capsys):
    arguments = ["sample", "--preset=mpdit_b", "--batch=1", "--steps=2", "--guidance_scale=1.5", "--repeats=1"]
    assert main([*arguments, "--format=json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["seconds"] > 0
    assert result["images_per_second"] == pytest.approx(1 / result["seconds"])
    assert result["speedup"] == pytest.approx(result["naive_seconds"] / result["seconds"])
    assert result["relative_difference"] < 1e-4
