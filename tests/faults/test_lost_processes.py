"""When one of several processes is lost, the others end and name it, and the restarted job goes on."""

import re
import resource
import shutil
import signal
import time

import pytest

from mpdit_jax.checkpoint.reader import list_steps
from tests.tiny import (
    assert_same_bits,
    free_port,
    join_flags,
    saved_arrays,
    start,
    start_joined,
    train_arguments,
)

HEARTBEAT = 10  # seconds
BOUND = 60  # seconds in which the remaining processes must have ended
LONG = ["--config.steps=100000", "--config.checkpoint.every=20", "--config.log.every=5"]


def start_all(workdir, *more, count=2, second=(), before=("", ""), port=None, **options):
    """Start all processes of a run.

    `second` and `options` are for the second process only; `before` has code that the first two run first.
    """
    port, arguments = port or free_port(), train_arguments(workdir, *more, f"--heartbeat_timeout={HEARTBEAT}")
    return [
        start(
            "train",
            [*arguments, *(second if index == 1 else ()), *join_flags(port, count, index)],
            before=before[index] if index < 2 else "",
            **(options if index == 1 else {}),
        )
        for index in range(count)
    ]


def outputs_of(processes, timeout=600):
    """Wait for the processes to end, and return stdout and stderr of each."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_for_step(workdir, process, step):
    end = time.monotonic() + 300
    while max(list_steps(workdir), default=0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, step
        time.sleep(0.1)


def names(stderr, lost):
    """Return whether JAX's last words name the lost process; JAX calls process 0 the leader, or the service there."""
    if lost == 0:
        return "leader (usually slice 0 task 0)" in stderr or "RPC: /xla.coordination.CoordinationService" in stderr
    return re.search(rf"stopped sending heartbeats\):\n{lost}\n|Task {lost} heartbeat timeout", stderr) is not None


STEPS = 50  # enough that the kill comes before the last one
SOME = [f"--config.steps={STEPS}", "--config.checkpoint.every=10", LONG[-1]]


def kill_one(workdir, count, lost):
    """Kill one of the processes of a run after its first checkpoint, and assert that the others end and name it."""
    processes = start_all(workdir, *SOME, count=count)
    try:
        wait_for_step(workdir, processes[0], 10)
        processes[lost].send_signal(signal.SIGKILL)
        since = time.monotonic()
        for index, process in enumerate(processes):
            _, stderr = process.communicate(timeout=BOUND)
            if index != lost:
                assert process.returncode == -signal.SIGABRT, stderr
                assert names(stderr, lost), stderr
        print(f"ended {time.monotonic() - since:.1f} s after process {lost} of {count} was killed")
        assert time.monotonic() - since < 2 * HEARTBEAT
    finally:
        outputs_of(processes)


@pytest.mark.slow
def test_a_killed_first_process_ends_the_others(tmp_path):
    kill_one(tmp_path / "run", 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "lost"), [(2, 1), (4, 2)])
def test_a_killed_process_ends_the_others_and_the_same_command_continues(tmp_path, count, lost):
    """The continued run ends in the bits of an undisturbed one."""
    workdir = tmp_path / "run"
    kill_one(workdir, count, lost)
    reached = list_steps(workdir)[-1]
    assert reached < STEPS
    again = start_all(workdir, *SOME, count=count)
    outputs = outputs_of(again)
    assert [process.returncode for process in again] == [0] * count, outputs
    assert f"continuing at step {reached}" in outputs[0][0]
    undisturbed = start_all(tmp_path / "undisturbed", *SOME, count=count)
    assert outputs_of(undisturbed)
    assert_same_bits(saved_arrays(workdir, STEPS), saved_arrays(tmp_path / "undisturbed", STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("silent", [1, 0])
def test_a_process_that_falls_silent(tmp_path, silent):
    """A stopped process sends nothing and keeps its connections, like that of a machine that is gone."""
    both = start_all(tmp_path / "run", *LONG)
    try:
        wait_for_step(tmp_path / "run", both[0], 20)
        both[silent].send_signal(signal.SIGSTOP)
        _, stderr = both[1 - silent].communicate(timeout=BOUND)
        assert both[1 - silent].returncode == -signal.SIGABRT
        assert names(stderr, silent), stderr
    finally:
        for process in both:
            process.kill()


SHARED = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.model.hidden_size=64"]  # each writes a half


OTHER_FOLDER = "from mpdit_jax.checkpoint import workdir\nworkdir.LOCK = 'elsewhere'"
LACKS_8 = "from pathlib import Path\nthere = Path.is_dir\nPath.is_dir = lambda self: self.name != '8' and there(self)"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "sentence"), [
    (OTHER_FOLDER, "process 1 has another folder under --workdir={} than process 0"),
    (LACKS_8, "process 1 does not see {}/checkpoints/8"),
])  # fmt: skip
def test_machines_that_do_not_share_the_workdir(finished, tmp_path, before, sentence):
    """Process 1 has another folder under the name of the workdir, or does not see its newest checkpoint."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    both = start_all(workdir, "--config.steps=10", before=("", before))
    for process, (_, stderr) in zip(both, outputs_of(both), strict=True):
        assert process.returncode == 1
        assert f"{sentence.format(workdir)}" in stderr
        assert "on a file system that" in stderr
        assert "Traceback" not in stderr
    assert list_steps(workdir) == [4, 8]


@pytest.mark.slow
def test_damage_is_agreed_on(tmp_path):
    """All processes use the older checkpoint, one of them says so, and they end in the bits of an undamaged run."""
    both = start_all(tmp_path / "whole", *SHARED)
    assert outputs_of(both)
    assert [process.returncode for process in both] == [0, 0]
    copy = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    part = max((copy / "checkpoints/8/parameters/ocdbt.process_1/d").iterdir(), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    (copy / "checkpoints/2").mkdir()  # what a kill during its deletion leaves
    both = start_all(copy, *SHARED)
    outputs = outputs_of(both)
    assert [process.returncode for process in both] == [0, 0], outputs
    text = "".join(text for output in outputs for text in output)
    assert text.count("damaged_checkpoints/8, and step 4 is used.") == text.count("damaged_checkpoints/2.") == 1
    assert text.count("continuing at step 4") == 1
    assert_same_bits(saved_arrays(tmp_path / "whole", 8), saved_arrays(copy, 8))
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (copy / "metrics.jsonl").read_bytes()
    assert {path.name for path in (copy / "damaged_checkpoints").iterdir()} == {"2", "8"}


@pytest.mark.slow
def test_a_disk_that_is_full_for_one(tmp_path):
    """The process that cannot write ends with a sentence; otherwise Orbax lets the other wait for 20 minutes."""

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    both = start_all(tmp_path / "run", *SHARED, preexec_fn=little_room)
    (_, first), (_, second) = outputs_of(both)
    assert [process.returncode for process in both] == [-signal.SIGABRT, 1], (first, second)
    assert "cannot be written" in second
    assert "(File too large), and no checkpoint is there yet: make room and repeat the command" in second
    assert names(first, 1), first
    assert list_steps(tmp_path / "run") == []


@pytest.mark.slow
def test_another_run_on_the_same_port_does_no_harm(tmp_path):
    """A second run on the first one's port is refused; local_multiprocess.sh always takes the same port."""
    port, long = free_port(), [*LONG, "--config.log.every=1000"]  # the test does not read the output meanwhile
    both = start_all(tmp_path / "run", *long, port=port)
    try:
        wait_for_step(tmp_path / "run", both[0], 20)
        intruders = start_all(tmp_path / "other", *long, "--initialization_timeout=3", port=port)
        (_, first), (_, second) = outputs_of(intruders, BOUND)
        assert [process.returncode for process in intruders] == [1, 1]
        assert first.startswith(f"error: process 0 cannot listen on port {port} (Address already in use), perhaps")
        assert f"process 0 at 127.0.0.1:{port} did not answer process 1 within 3 s" in second
        assert "whether another run has that address" in second
        assert [len(text.splitlines()) for text in (first, second)] == [1, 1]
        assert not (tmp_path / "other").exists()
        wait_for_step(tmp_path / "run", both[0], max(list_steps(tmp_path / "run")) + 20)
    finally:
        for process in both:
            process.send_signal(signal.SIGTERM)
        outputs = outputs_of(both, BOUND)
    assert [process.returncode for process in both] == [0, 0], outputs


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["an error", "a bug"])
def test_an_error_of_one_ends_all(fault):
    """The process ends with its error without waiting, and JAX ends the process that waits for it."""
    raised = "InputError('no such data')" if fault == "an error" else "IndexError('a bug')"
    both = start_joined(f"if options.process_id == 1:\n    raise {raised}")
    (_, first), (_, second) = outputs_of(both, BOUND)
    assert [process.returncode for process in both] == [-signal.SIGABRT, 1], (first, second)
    assert names(first, 1), first
    assert second.strip().splitlines()[-1] == ("error: no such data" if fault == "an error" else "IndexError: a bug")
    assert "***" not in second


@pytest.mark.slow
def test_an_error_of_all_is_a_sentence_of_each():
    """Processes that meet the same error at different times each print it, and none is taken for lost."""
    for process in start_joined("time.sleep(options.process_id)\nraise InputError('no such data')", 4):
        _, stderr = process.communicate(timeout=BOUND)
        assert (process.returncode, stderr) == (1, "error: no such data\n")
