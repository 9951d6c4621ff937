"""A training that is killed at many random moments ends in the bits of an undisturbed run.

MPDIT_JAX_KILLS=500 raises the number of kills, MPDIT_JAX_KILL_SEED=7 repeats a series.
"""

import contextlib
import json
import os
import random
import time

import numpy as np
import pytest

from mpdit_jax.checkpoint.reader import is_complete
from tests.faults.fork_server import wait_until
from tests.tiny import ROOT, assert_same_bits, run, saved_arrays

KILLS = int(os.environ.get("MPDIT_JAX_KILLS", "12"))
STEPS = 50
TINY = [  # one level: the time of a save grows with the number of arrays
    f"--config={ROOT / 'configs/digits.py'}", "--config.data.name=arrays", "--config.batch_size=4",
    "--config.model.patch_sizes=2,", "--config.model.depths=1,", "--config.model.hidden_size=16",
    "--config.model.num_heads=2", "--config.model.time_embedding=sinusoidal", f"--config.steps={STEPS}",
    "--config.log.every=1", "--config.checkpoint.every=2", "--config.checkpoint.keep=2", "--config.sample.every=0",
    "--config.eval.every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """The arguments of the run without its workdir; its data are read without scikit-learn."""
    path, draw = tmp_path_factory.mktemp("data") / "digits.npz", np.random.default_rng(0)
    np.savez(path, images=draw.integers(0, 255, (50, 8, 8, 1), np.uint8), labels=np.arange(50) % 10)
    return [*TINY, f"--config.data.path={path}"]


@pytest.fixture(scope="module")
def undisturbed(fork_server, arguments, tmp_path_factory):
    """The workdir of an undisturbed run, started as a user starts it."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, _, stderr = run("train", [*arguments, f"--workdir={workdir}"])
    assert status == 0, stderr
    return workdir


def being_saved(workdir):
    """The unfinished checkpoints in a workdir as (name, inode): Orbax may use a name again for another folder."""
    found = set()
    for path in (workdir / "checkpoints").glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):  # the checkpoint has been renamed meanwhile
            found.add((path.name, path.stat().st_ino))
    return found


def kill_once(fork_server, arguments, workdir, draw):
    """Start the run and kill it at a random moment; return what it was doing, and whether it had ended before."""
    left = being_saved(workdir)  # left by an earlier kill
    child, begun = fork_server.start("train", arguments), time.monotonic()
    how = draw.choices(["starting", "running", "saving"], [2, 5, 4])[0]
    if how == "starting":
        moment = begun + draw.uniform(0, 2)
        wait_until(lambda: time.monotonic() > moment, child)
    else:
        wait_until(lambda: "\nstep " in child.text(), child)
        if how == "saving":
            wait_until(lambda: being_saved(workdir) - left, child)
            time.sleep(draw.uniform(0, 0.08))
        else:
            time.sleep(draw.uniform(0, 0.5))
    status = child.kill()
    assert status in (0, -9), child.text()
    if "\nstep " not in child.text():  # an unfinished checkpoint is then of an earlier kill
        return "starting", status == 0
    return "saving" if being_saved(workdir) - left else "running", status == 0


@pytest.mark.slow
def test_killed_at_random_moments(fork_server, arguments, undisturbed, tmp_path):
    """The kills go on in another workdir whenever a run has reached its end."""
    seed = int(os.environ.get("MPDIT_JAX_KILL_SEED", random.SystemRandom().randrange(2**32)))
    print(f"seed {seed}")
    draw, counts, runs, done = random.Random(seed), dict.fromkeys(("starting", "running", "saving"), 0), 0, True
    while sum(counts.values()) < KILLS or not done:
        if done:
            runs += 1
            workdir = tmp_path / f"run_{runs}"
            mine = [*arguments, f"--workdir={workdir}"]
        if sum(counts.values()) < KILLS:
            how, done = kill_once(fork_server, mine, workdir, draw)
            counts[how] += not done
        else:
            fork_server.run("train", mine)
            done = True
        if done:
            assert_same_run(undisturbed, workdir)
    print(f"seed {seed}: {KILLS} kills in {runs} runs, by what the process was doing: {counts}")
    assert counts["saving"] >= KILLS // 10  # in the middle of an asynchronous save


def assert_same_run(expected, workdir):
    """Both runs have the same bits in every array and the same metrics.jsonl, which has no step twice."""
    assert_same_bits(saved_arrays(expected, STEPS), saved_arrays(workdir, STEPS))
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert metrics == (expected / "metrics.jsonl").read_bytes()
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == list(range(1, STEPS + 1))
    # A kill damages nothing; one in the middle of the deletion of an old checkpoint leaves a part of it.
    assert not [path for path in (workdir / "damaged_checkpoints").glob("*") if is_complete(path)]
