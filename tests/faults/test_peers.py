"""When one of several processes is lost, the others say so and end, and the restarted job goes on."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from mpdit_jax.checkpoint.reader import list_steps
from tests.tiny import (
    ROOT,
    assert_same_bits,
    free_port,
    join_flags,
    saved_arrays,
    start,
    start_joined,
    train_arguments,
)

BOUND = 60  # seconds in which the remaining process must have ended
LONG = ["--config.steps=100000", "--config.checkpoint.every=20", "--config.log.every=5"]


def start_both(workdir, *more, second=(), port=None, **options):
    """Both processes; arguments of the second alone, and options of its start."""
    port, arguments = port or free_port(), train_arguments(workdir, *more)
    return [
        start("train", [*arguments, *join_flags(port, 2, 0)]),
        start("train", [*arguments, *second, *join_flags(port, 2, 1)], **options),
    ]


def outputs_of(both, timeout=300):
    """What both print, stdout and stderr each; they have ended."""
    try:
        return [process.communicate(timeout=timeout) for process in both]
    finally:
        for process in both:
            process.kill()


def wait_for_step(workdir, process, step):
    end = time.monotonic() + 300
    while max(list_steps(workdir), default=0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, step
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0])
def test_the_lost_process_is_named(tmp_path, lost):
    workdir = tmp_path / "run"
    both = start_both(workdir, *LONG)
    try:
        wait_for_step(workdir, both[0], 20)
        both[lost].send_signal(signal.SIGKILL)
        since = time.monotonic()
        _, stderr = both[1 - lost].communicate(timeout=BOUND)
        print(f"ended {time.monotonic() - since:.1f} s after process {lost} was killed")
        assert both[1 - lost].returncode == 1
        assert f"error: process {lost} of 2 was lost" in stderr
        assert "the same command on all machines continues from the newest checkpoint" in stderr
        assert "Traceback" not in stderr
        assert "*** Check failure" not in stderr
        reached = list_steps(workdir)[-1]
        if lost == 1:  # once is enough
            again = start_both(workdir, f"--config.steps={reached + 5}", *LONG[1:])
            outputs = [process.communicate(timeout=300) for process in again]
            assert [process.returncode for process in again] == [0, 0], outputs
            assert f"continuing at step {reached}" in outputs[0][0]
    finally:
        for process in both:
            process.kill()


SOON = "from mpdit_jax.distributed import peers\npeers._SILENCE, peers._EVERY = 5.0, 0.5"  # rather than a minute


@pytest.mark.slow
def test_a_process_that_falls_silent_is_named(tmp_path):
    """As that of a machine that is gone: nothing comes from it, and its connections do not end."""
    workdir, port = tmp_path / "run", free_port()
    both = [
        start("train", [*train_arguments(workdir, *LONG), *join_flags(port, 2, index)], before=SOON)
        for index in range(2)
    ]
    try:
        wait_for_step(workdir, both[0], 20)
        both[0].send_signal(signal.SIGSTOP)
        _, stderr = both[1].communicate(timeout=BOUND)
        assert both[1].returncode == 1
        assert "error: process 0 of 2 was lost (no sign of life for 5 s)" in stderr
        assert "Traceback" not in stderr
    finally:
        for process in both:
            process.kill()


SHARED = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.model.hidden_size=64"]  # each writes a half


OTHER_FOLDER = "from mpdit_jax.checkpoint import workdir\nworkdir._LOCK = 'elsewhere'"
LACKS_8 = "from pathlib import Path\nthere = Path.is_dir\nPath.is_dir = lambda self: self.name != '8' and there(self)"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "sentence"), [
    (OTHER_FOLDER, "process 1 has another folder under --workdir={} than process 0"),
    (LACKS_8, "process 1 does not see {}/checkpoints/8"),
])  # fmt: skip
def test_machines_that_do_not_share_the_workdir(finished, tmp_path, before, sentence):
    """Process 1 looks at what lies elsewhere, or at what its file system has not heard of."""
    workdir, port = shutil.copytree(finished, tmp_path / "run"), free_port()
    both = [
        start("train", [*train_arguments(workdir, "--config.steps=10"), *join_flags(port, 2, index)], before=code)
        for index, code in enumerate(("", before))
    ]
    for process, (_, stderr) in zip(both, outputs_of(both), strict=True):
        assert process.returncode == 1
        assert f"{sentence.format(workdir)}" in stderr
        assert "on a file system that" in stderr
        assert "Traceback" not in stderr
    assert list_steps(workdir) == [4, 8]


@pytest.mark.slow
def test_damage_is_agreed_on(tmp_path):
    """All use the older checkpoint, one tells of it, and they end in the bits of a run that lost nothing."""
    both = start_both(tmp_path / "whole", *SHARED)
    assert outputs_of(both)
    assert [process.returncode for process in both] == [0, 0]
    copy = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    part = max((copy / "checkpoints/8/parameters/ocdbt.process_1/d").iterdir(), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    (copy / "checkpoints/2").mkdir()  # as a kill in the middle of its deletion leaves it
    both = start_both(copy, *SHARED)
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
    """The other one would wait 20 minutes for its half of the checkpoint, and then say something else."""

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    both = start_both(tmp_path / "run", *SHARED, preexec_fn=little_room)
    (_, first), (_, second) = outputs_of(both)
    assert [process.returncode for process in both] == [1, 1], (first, second)
    assert "cannot be written" in second
    assert "(File too large), and no checkpoint is there yet: make room and repeat the command" in second
    assert "error: process 1 of 2 was lost (it ended with an error)" in first
    assert "Traceback" not in first + second
    assert "***" not in first + second
    assert list_steps(tmp_path / "run") == []


@pytest.mark.slow
def test_another_run_on_the_same_port_does_no_harm(tmp_path):
    """As when two are started with local_multiprocess.sh, whose port is always the same."""
    port, long = free_port(), [*LONG, "--config.log.every=1000"]  # nobody reads it meanwhile
    both = start_both(tmp_path / "run", *long, port=port)
    try:
        wait_for_step(tmp_path / "run", both[0], 20)
        intruders = start_both(tmp_path / "other", *long, "--join_timeout=3", port=port)
        (_, first), (_, second) = outputs_of(intruders, BOUND)
        assert first.startswith(f"error: process 0 cannot listen on port {port} (Address already in use, perhaps")
        assert "has all its processes, and had after 3 s: process 1 was started twice, or is of another run" in second
        assert [len(text.splitlines()) for text in (first, second)] == [1, 1]
        assert not (tmp_path / "other").exists()
        wait_for_step(tmp_path / "run", both[0], max(list_steps(tmp_path / "run")) + 20)
    finally:
        for process in both:
            process.send_signal(signal.SIGTERM)
        outputs = outputs_of(both, BOUND)
    assert [process.returncode for process in both] == [0, 0], outputs


@pytest.mark.parametrize("fault", ["an error", "a bug"])
def test_an_error_of_one_ends_all(fault):
    """Whoever waits for it hears of it and ends, and it does not wait for them."""
    raised = "InputError('no such data')" if fault == "an error" else "IndexError('a bug')"
    both = start_joined(f"if options.process_id == 1:\n    raise {raised}")
    (_, first), (_, second) = outputs_of(both, BOUND + 30)
    assert [process.returncode for process in both] == [1, 1], (first, second)
    assert "process 1 of 2 was lost (it ended with an error)" in first
    assert second.strip().splitlines()[-1] == ("error: no such data" if fault == "an error" else "IndexError: a bug")
    assert "***" not in first + second


WATCH = """
import socket, sys, time
from mpdit_jax.distributed import peers
from mpdit_jax.distributed.roll_call import Joined
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
peers.start_watch(1, 3, Joined({0: connection}))
print("ready", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize(("message", "sentence"), [
    (b"", "process 0 of 3 was lost (its connection ended)"),
    (b"aal\x02\x00", "process 2 of 3 was lost (as process 0 says)"),
])  # fmt: skip
def test_the_watch_ends_a_process_that_waits(message, sentence):
    """Without JAX: a process that sleeps hears of the loss and ends with status 1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", WATCH, str(server.getsockname()[1])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ,
        )  # fmt: skip
        peer, _ = server.accept()
        assert process.stdout.readline() == "ready\n"
        peer.send(message)
        peer.close()
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert stderr.startswith(f"error: {sentence}")


def test_who_leaves_is_not_lost():
    with socket.create_server(("127.0.0.1", 0)) as server:
        script = WATCH.replace("time.sleep(30)", "time.sleep(3)\nprint('on my own')")
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(server.getsockname()[1])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ,
        )  # fmt: skip
        peer, _ = server.accept()
        assert process.stdout.readline() == "ready\n"
        peer.send(b"q")
        peer.close()
        stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout, stderr) == (0, "on my own\n", "")
