"""Several processes, started as a user starts them, give the run of one; processes that differ are refused."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from mpdit_jax.checkpoint.reader import list_steps
from tests.tiny import (
    COMPARABLE,
    ROOT,
    TWO_LEVELS,
    assert_near,
    free_port,
    join_flags,
    losses,
    run,
    saved_arrays,
    start,
    train_arguments,
)

STEPS = 10
LONG = [f"--config.steps={STEPS}", "--config.checkpoint.every=5", "--config.log.every=1", COMPARABLE, *TWO_LEVELS]


def launch(count, devices, *arguments, **options):
    """Start `launch/local_multiprocess.sh`, with stdout and stderr in one stream."""
    settings = {"PYTHON": sys.executable, "DEVICES": str(devices), "PORT": str(free_port())}
    script = ROOT / "launch/local_multiprocess.sh"
    return subprocess.Popen(
        ["bash", str(script), str(count), *arguments],
        env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def all_refuse(processes, sentence):
    """Check that each process ends with status 1 and the sentence."""
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        assert sentence in stderr
        assert "Traceback" not in stderr


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    status, _, stderr = run("train", train_arguments(workdir, *LONG))
    assert status == 0, stderr
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "fsdp"), [(2, 2), (4, 8)])
def test_several_processes_give_the_same_run(one_process, tmp_path, processes, fsdp):
    """Eight devices hold four states split in two, or one split over all."""
    workdir, mesh = tmp_path / "run", f"--config.mesh.fsdp={fsdp}"
    process = launch(processes, 8 // processes, "train", *train_arguments(workdir, *LONG, mesh))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert f"8 cpu device(s) of {processes} processes" in output
    assert output.count("done: checkpoints in") == 1  # the first process alone is_primary
    np.testing.assert_allclose(losses(workdir), losses(one_process), rtol=1e-5)
    assert_near(saved_arrays(workdir, STEPS), saved_arrays(one_process, STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path, count):
    """A status other than 0 for stopped runs is not taken for a failure by the other processes."""
    workdir, port = tmp_path / "run", free_port()
    more = ["--config.steps=4000", "--config.checkpoint.every=100000", "--config.log.every=10"]
    processes = [
        start(
            "train",
            [*train_arguments(workdir, *more), *join_flags(port, count, index)],
            extra={"MPDIT_JAX_STOPPED_STATUS": "75"},
        )
        for index in range(count)
    ]
    for line in processes[0].stdout:
        if "images/s" in line:
            break
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [75] * count, outputs
    (stopped,) = list_steps(workdir)
    assert f"stopped at step {stopped} of 4000, saved; continue with:" in outputs[0][0]


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_of_several_processes(tmp_path):
    """Ctrl-C reaches the script and the processes that it has started."""
    workdir, more = tmp_path / "run", ["--config.steps=4000", "--config.checkpoint.every=100000"]
    process = launch(2, 1, "train", *train_arguments(workdir, *more, "--config.log.every=10"), process_group=0)
    for line in process.stdout:
        if "images/s" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    (stopped,) = list_steps(workdir)
    assert f"stopped at step {stopped} of 4000, saved; continue with:" in output


@pytest.mark.slow
def test_processes_with_other_data_are_told_apart(tmp_path):
    """One machine has a stale copy of the data under the same path."""
    port, pair = free_port(), []
    for index in range(2):
        np.savez(
            tmp_path / f"{index}.npz",
            images=np.zeros((20 + index, 8, 8, 1), np.uint8),
            labels=np.zeros(20 + index, int),
        )
        data = ["--config.data.name=arrays", f"--config.data.path={tmp_path / f'{index}.npz'}"]
        pair.append(start("train", [*train_arguments(tmp_path / "run", *data), *join_flags(port, 2, index)]))
    all_refuse(pair, "process 1 was started with data=21 ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "missing"), [(2, 1), (2, 0), (4, 2)])
def test_a_process_that_never_joins(tmp_path, count, missing):
    port = free_port()
    arguments = train_arguments(tmp_path / "run", "--initialization_timeout=5")
    present = [
        start("train", [*arguments, *join_flags(port, count, index)]) for index in range(count) if index != missing
    ]
    for process in present:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        nobody = f"error: process 0 at 127.0.0.1:{port} did not answer process"
        assert stderr.startswith(nobody if missing == 0 else "error: not all processes joined")
        assert "within 5 s" in stderr
        # JAX may add lines of its own while it ends.
        assert [line for line in stderr.splitlines() if line.startswith(("error", "Traceback"))] == [
            stderr.splitlines()[0]
        ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_with_other_configs_are_told_apart(tmp_path, count):
    port = free_port()
    processes = [
        start("train", [*train_arguments(tmp_path / "run", size), *join_flags(port, count, index)])
        for index, size in enumerate(f"--config.batch_size={16 if index == 1 else 8}" for index in range(count))
    ]
    all_refuse(processes, "process 1 was started with config.batch_size=16 instead of 8, unlike process 0")
    assert not (tmp_path / "run").exists()
