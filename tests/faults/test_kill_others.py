"""`sample`, `prepare`, `evaluate` and a training that evaluates write the same output if they are killed meanwhile.

MPDIT_JAX_KILL_SEED=N repeats the moments of a run that failed, which prints N first.
"""

import os
import random
import time

import numpy as np
import pytest
from PIL import Image

from mpdit_jax.evaluate.classifier import ClassifierConfig, initialize, save_classifier
from tests.faults.fork_server import wait_until
from tests.prepare.conftest import make_vae
from tests.sample.conftest import make_workdir, read_npz
from tests.tiny import assert_same_bits, saved_arrays, train_arguments

KILLS = 4


def kill_and_finish(fork_server, command, arguments, progress, total):
    """Kill a command KILLS times at random moments and once in its last lines, then run it to its end.

    Args:
        fork_server: starts the command.
        command: its name.
        arguments: its arguments.
        progress: returns a count that grows with the work done.
        total: the count when everything but the last lines is done.
    """
    seed = int(os.environ.get("MPDIT_JAX_KILL_SEED", random.SystemRandom().randrange(2**32)))
    print(f"seed {seed}")
    draw, killed = random.Random(seed), 0
    for number in range(KILLS + 1):
        before, child = progress(), fork_server.start(command, arguments)
        goal = before + draw.randint(1, max(1, (total - before) // 2)) if number < KILLS else total
        wait_until(lambda goal=goal: progress() >= goal, child)
        time.sleep(draw.uniform(0, 0.1))
        killed += child.kill() != 0
    print(f"killed {killed} times")
    assert killed >= 2, "it is over too soon to be killed"
    return fork_server.run(command, arguments)


@pytest.mark.slow
def test_sample(fork_server, tmp_path):
    workdir = make_workdir(tmp_path / "run")
    arguments = [f"--workdir={workdir}", "--steps=8", "--batch_size=2", "--num_samples=800"]
    fork_server.run("sample", [*arguments, f"--out={tmp_path / 'undisturbed.npz'}"])
    out = tmp_path / "killed.npz"
    blocks = tmp_path / "killed.npz.unfinished"
    text = kill_and_finish(
        fork_server, "sample", [*arguments, f"--out={out}"], lambda: len(list(blocks.glob("*[0-9].npz"))), 400
    )
    assert "images are there already" in text
    expected, found = read_npz(tmp_path / "undisturbed.npz"), read_npz(out)
    assert {name: array.tobytes() for name, array in expected.items()} == {
        name: array.tobytes() for name, array in found.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.npz", "run", "undisturbed.npz"]


@pytest.mark.slow
def test_prepare(fork_server, tmp_path):
    folder, draw = tmp_path / "images", np.random.default_rng(0)
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        for index in range(50):
            Image.fromarray(draw.integers(0, 255, (8, 8), np.uint8)).save(folder / name / f"{index}.png")
    vae = make_vae(tmp_path / "vae", seed=0)
    arguments = [f"--images={folder}", f"--vae={vae}", "--image_size=8", "--shard_size=1", "--batch_size=1"]
    expected, out = tmp_path / "undisturbed", tmp_path / "killed"
    fork_server.run("prepare", [*arguments, f"--out={expected}"])
    kill_and_finish(
        fork_server, "prepare", [*arguments, f"--out={out}"], lambda: len(list(out.glob("shard-*.array_record"))), 100
    )
    names = [path.name for path in expected.iterdir() if path.name != ".lock"]
    assert sorted(names) == sorted(path.name for path in out.iterdir() if path.name != ".lock")
    for name in names:
        assert (expected / name).read_bytes() == (out / name).read_bytes(), name
    fork_server.run("prepare", ["--verify", f"--out={out}"])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """An untrained classifier of 8x8 images, whose features evaluations use."""
    path = tmp_path_factory.mktemp("classifier") / "tiny.safetensors"
    save_classifier(path, initialize(ClassifierConfig(8, 8, 1, num_classes=10, base_channels=4, features=8), seed=0))
    return path


def leave_litter(folder):
    """Leave what a kill in the last lines leaves; they are too short for a kill to meet them."""
    (folder / "numbers.json.unfinished.old" / "samples_0").mkdir(parents=True)
    for name in ("numbers.json", "statistics.npz"):
        (folder / f".{name}.k1ll3d_0.tmp").write_text("half")


@pytest.mark.slow
def test_evaluate_a_run(fork_server, classifier, tmp_path):
    """Finished settings are not drawn again, nor finished blocks of an unfinished setting."""
    workdir, found = make_workdir(tmp_path / "run"), tmp_path / "found"
    arguments = [
        f"--workdir={workdir}", f"--features=classifier:{classifier}", "--metrics=fd,is,precision,recall,kid",
        "--num_samples=240", "--batch_size=8", "--guidance_scale=1.0,1.5", "--steps=4",
    ]  # fmt: skip
    fork_server.run("evaluate", [*arguments, f"--out={tmp_path / 'expected' / 'numbers.json'}"])
    leave_litter(found)
    (found / ".statistics.npz.k1ll3d_0.tmp").unlink()  # evaluate does not delete another command's temporaries
    text = kill_and_finish(
        fork_server,
        "evaluate",
        [*arguments, f"--out={found / 'numbers.json'}"],
        # A finished row counts more than its blocks, which are then deleted.
        lambda: 100 * len(list(found.glob("*[0-9a-f].json"))) + len(list(found.glob("*.unfinished/*/*[0-9].npz"))),
        200,
    )
    assert "are there already" in text or "done before" in text
    assert_same_files(tmp_path / "expected", found)


@pytest.mark.slow
def test_evaluate_images(fork_server, classifier, tmp_path):
    """The numbers and the saved statistics are those of an undisturbed evaluation."""
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "samples.npz", arr_0=draw.integers(0, 255, (20_000, 8, 8, 1), np.uint8))
    arguments = [
        f"--samples={tmp_path / 'samples.npz'}", f"--features=classifier:{classifier}", "--reference=data:digits",
        "--metrics=fd", "--batch_size=512", "--save_features",
    ]  # fmt: skip

    def into(folder):
        return [*arguments, f"--out={folder / 'numbers.json'}", f"--save_stats={folder / 'statistics.npz'}"]

    expected, found = tmp_path / "expected", tmp_path / "found"
    fork_server.run("evaluate", into(expected))
    leave_litter(found)
    kill_and_finish(
        fork_server, "evaluate", into(found), lambda: len(list(found.glob("*.unfinished/*/*[0-9].npz"))), 40
    )
    assert_same_files(expected, found)


@pytest.mark.slow
def test_train_with_evaluations(fork_server, classifier, tmp_path):
    """A training that is killed during an evaluation repeats it: the log is the same to the byte."""
    arguments = train_arguments(
        "", "--config.steps=16", "--config.checkpoint.every=2", "--config.eval.every=2",
        f"--config.eval.features=classifier:{classifier}", "--config.eval.num_samples=32",
        "--config.eval.batch_size=4", "--config.eval.steps=4", "--config.eval.guidance_scales=2.0,",
        "--config.eval.metrics=fd",
    )  # fmt: skip
    fork_server.run("train", [*arguments, f"--workdir={tmp_path / 'expected'}"])
    metrics = tmp_path / "found" / "metrics.jsonl"
    kill_and_finish(
        fork_server,
        "train",
        [*arguments, f"--workdir={tmp_path / 'found'}"],
        lambda: metrics.read_text().count("guidance_2") if metrics.exists() else 0,
        8,
    )
    lines = metrics.read_text().splitlines()
    assert sum("guidance_2" in line for line in lines) == 8
    assert metrics.read_bytes() == (tmp_path / "expected" / "metrics.jsonl").read_bytes()
    assert_same_bits(saved_arrays(tmp_path / "expected", 16), saved_arrays(tmp_path / "found", 16))


def assert_same_files(expected, found):
    """Both folders have the same files with the same bytes."""
    assert sorted(path.name for path in expected.iterdir()) == sorted(path.name for path in found.iterdir())
    for path in expected.iterdir():
        assert path.read_bytes() == (found / path.name).read_bytes(), path.name
