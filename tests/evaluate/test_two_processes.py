"""Two processes share one `python -m mpdit_jax.evaluate`."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mpdit_jax.evaluate.classifier import ClassifierConfig, initialize, save_classifier
from tests.sample.conftest import make_workdir
from tests.tiny import free_port, join_flags, run, start
from tests.train.test_processes import all_refuse


@pytest.mark.slow
def test_a_run_is_compared_by_two_processes_as_by_one(tmp_path, classifier_file):
    """Each process computes its share of the blocks; the first alone writes, and nothing unfinished remains."""
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
    assert "drawing samples: 300/300" in told
    assert "drawing samples: 300/300" in untold
    assert "done before" not in told
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("one", "two"))
    assert [row["name"] for row in one] == [row["name"] for row in two]
    for alone, shared in zip(one, two, strict=True):
        assert shared["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
        assert shared["settings"]["samples"] == alone["settings"]["samples"]
    left = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert next(left) == next(left)
    assert not [path.name for path in tmp_path.rglob("*") if ".unfinished" in path.name or path.suffix == ".tmp"]


@pytest.fixture
def machines(tmp_path, classifier_file, digits):
    """Return two folders with the same classifier and images; the second is a later copy of the first."""
    first = tmp_path / "first"
    (first / "samples").mkdir(parents=True)
    for index, image in enumerate(digits[0][:40]):
        Image.fromarray(image[..., 0]).save(first / f"samples/{index:02}.png")
    np.savez(first / "real.npz", arr_0=digits[0][:600])
    shutil.copy(classifier_file, first / "c.safetensors")
    return first, shutil.copytree(first, tmp_path / "second", copy_function=shutil.copy)


def evaluating(machines, out, features, what=("--samples=samples",)):
    """Start two processes, each in its own folder, which is also its home."""
    port = free_port()
    arguments = [*what, "--reference=real.npz", "--metrics=fd,precision", f"--out={out}"]
    return [
        start(
            "evaluate", [*arguments, *features, *join_flags(port, 2, index)], cwd=machine,
            extra={"HOME": str(machine), "MPDIT_JAX_INCEPTION": ""},
        )
        for index, machine in enumerate(machines)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", [["--samples=samples"], ["--workdir=run", "--num_samples=40", "--steps=1"]])
def test_two_machines_read_copies_of_one_set(machines, tmp_path, what):
    """Their features meet in one folder, although paths and times of the files differ."""
    out = tmp_path / "out.json"
    shutil.copytree(make_workdir(machines[0] / "run"), machines[1] / "run")
    processes = evaluating(machines, out, ["--features=classifier:c.safetensors", "--batch_size=20"], what)
    (told, first), (_, second) = (process.communicate(timeout=200) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], (first, second)
    assert "FD(classifier)" in told
    assert len(json.loads(out.read_text())["results"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("differing", "sentence"), [
    ("samples", "count=39 instead of 40"),
    ("real", "process 1 was started with contents="),
    ("extractor", "process 1 was started with extractor="),
])  # fmt: skip
def test_two_machines_with_other_files_are_refused(machines, tmp_path, digits, differing, sentence):
    """The files are compared before any features are computed."""
    second = machines[1]
    if differing == "samples":
        (second / "samples/39.png").unlink()
    elif differing == "real":
        np.savez(second / "real.npz", arr_0=255 - digits[0][:600])
    else:
        config = ClassifierConfig(8, 8, 1, num_classes=10)
        save_classifier(second / "c.safetensors", initialize(config, seed=0))
    all_refuse(evaluating(machines, tmp_path / "out.json", ["--features=classifier:c.safetensors"]), sentence)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_two_machines_of_which_one_has_inceptions_weights_are_refused(machines, tmp_path):
    """Each machine alone would choose another network."""
    cache = machines[1] / ".cache/mpdit_jax"
    cache.mkdir(parents=True)
    (cache / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"")
    processes = evaluating(machines, tmp_path / "out.json", [])
    all_refuse(processes, "features=inception instead of efficientnet_lite0")
