"""When one of several processes is lost, the others say so and end, and the restarted job goes on."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mpdit_jax.stored import list_steps
from tests.tiny import ROOT, free_port, join_flags, start, train_arguments

BOUND = 60  # seconds in which the remaining process must have ended
LONG = ["--config.steps=100000", "--config.checkpoint.every=20", "--config.log.every=5"]


def start_both(workdir, *more):
    port = free_port()
    return [start("train", [*train_arguments(workdir, *more), *join_flags(port, 2, index)]) for index in (0, 1)]


def wait_for_step(workdir, process, step):
    while max(list_steps(workdir), default=0) < step:
        assert process.poll() is None, process.communicate()
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


WATCH = """
import socket, sys, time
from mpdit_jax import peers
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
peers.start_watch(1, 3, {0: connection})
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
