"""`python -m mpdit_jax.evaluate` that two processes share."""

import json

import pytest

from tests.sampling.conftest import make_workdir
from tests.tiny import free_port, join_flags, run, start


@pytest.mark.slow
def test_a_run_is_compared_by_two_processes_as_by_one(tmp_path, classifier_file):
    """Each looks at its share of the blocks; the first alone writes, and nothing unfinished is left behind."""
    workdir = make_workdir(tmp_path / "run")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    arguments = [
        f"--workdir={workdir}", f"--features=classifier:{classifier_file}", "--reference=data:digits:test",
        "--num_samples=600", "--steps=2", "--guidance_scale=1.5,1.0", "--batch_size=100",
        "--metrics=fd,is,precision,recall,kid",
    ]  # fmt: skip
    status, _, stderr = run("evaluate", [*arguments, f"--out={tmp_path / 'one/results.json'}"])
    assert status == 0, stderr
    port = free_port()
    processes = [
        start("evaluate", [*arguments, f"--out={tmp_path / 'two/results.json'}", *join_flags(port, 2, index)])
        for index in range(2)
    ]
    (told, first), (untold, second) = (process.communicate(timeout=200) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], (first, second)
    assert "FD(classifier)" in told
    assert "FD(classifier)" not in untold
    assert "looking at samples: 512/512" in told
    assert "looking at samples: 88/88" in untold
    assert "done before" not in told
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("one", "two"))
    assert [row["name"] for row in one] == [row["name"] for row in two]
    for alone, shared in zip(one, two, strict=True):
        assert shared["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
        assert shared["settings"]["samples"] == alone["settings"]["samples"]
    left = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert next(left) == next(left)
