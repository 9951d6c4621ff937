"""Large `sample` runs and `prepare`, killed at random moments: the finished output is that of an undisturbed run."""

import random
import time

import numpy as np
import pytest
from PIL import Image

from tests.faults.nursery import Nursery, wait_until
from tests.preparing.conftest import make_vae
from tests.sampling.conftest import make_workdir, read_npz

KILLS = 4


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


def kill_and_finish(nursery, command, arguments, progress):
    """Kill a command KILLS times, each time at a random moment after `progress()` has grown; then let it end."""
    seed = random.SystemRandom().randrange(2**32)
    draw, killed = random.Random(seed), 0
    for _ in range(KILLS):
        before, child = progress(), nursery.start(command, arguments)
        wait_until(lambda before=before: progress() > before, child)
        time.sleep(draw.uniform(0, 0.1))
        killed += child.kill() != 0
    print(f"seed {seed}: killed {killed} times")
    assert killed >= 2, "it is over too soon to be killed"
    return nursery.run(command, arguments)


def test_sample(nursery, tmp_path):
    workdir = make_workdir(tmp_path / "run")
    arguments = [f"--workdir={workdir}", "--steps=8", "--batch_size=2", "--num_samples=800"]
    nursery.run("sample", [*arguments, f"--out={tmp_path / 'undisturbed.npz'}"])
    out = tmp_path / "killed.npz"
    blocks = tmp_path / "killed.npz.unfinished"
    text = kill_and_finish(
        nursery, "sample", [*arguments, f"--out={out}"], lambda: len(list(blocks.glob("*[0-9].npz")))
    )
    assert "images are there already" in text
    expected, found = read_npz(tmp_path / "undisturbed.npz"), read_npz(out)
    assert {name: array.tobytes() for name, array in expected.items()} == {
        name: array.tobytes() for name, array in found.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.npz", "run", "undisturbed.npz"]


def test_prepare(nursery, tmp_path):
    folder, draw = tmp_path / "images", np.random.default_rng(0)
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        for index in range(50):
            Image.fromarray(draw.integers(0, 255, (8, 8), np.uint8)).save(folder / name / f"{index}.png")
    vae = make_vae(tmp_path / "vae", seed=0)
    arguments = [f"--images={folder}", f"--vae={vae}", "--image_size=8", "--shard_size=1", "--batch_size=1"]
    expected, out = tmp_path / "undisturbed", tmp_path / "killed"
    nursery.run("prepare", [*arguments, f"--out={expected}"])
    kill_and_finish(
        nursery, "prepare", [*arguments, f"--out={out}"], lambda: len(list(out.glob("shard-*.array_record")))
    )
    names = [path.name for path in expected.iterdir() if path.name != ".lock"]
    assert sorted(names) == sorted(path.name for path in out.iterdir() if path.name != ".lock")
    for name in names:
        assert (expected / name).read_bytes() == (out / name).read_bytes(), name
    nursery.run("prepare", ["--verify", f"--out={out}"])
