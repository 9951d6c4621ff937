"""How a process learns which cluster it is part of."""

import argparse
import contextlib
import signal
import socket
import threading
import time

import numpy as np
import pytest

from mpdit_jax.errors import ConfigError, ProcessError
from mpdit_jax.processes import (
    Cluster,
    add_flags,
    compare_facts,
    find_cluster,
    first_host,
    join,
    on_cloud_tpu,
    roll_call,
)
from tests.tiny import free_port, start_joined


def test_alone_unless_something_says_otherwise():
    assert find_cluster({}) is None
    assert find_cluster({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is None  # an allocation without a step


def test_slurm():
    step = {"SLURM_NTASKS": "16", "SLURM_PROCID": "5", "SLURM_STEP_NODELIST": "gpu[03-04]"}
    assert find_cluster({"SLURM_JOB_ID": "123456", **step}) == Cluster("gpu03:56064", 16, 5)


@pytest.mark.parametrize(("nodes", "host"), [
    ("node1", "node1"),
    ("node1,node2", "node1"),
    ("gpu[03-07,11],login", "gpu03"),
    ("rack[2,9]-n", "rack2-n"),
])  # fmt: skip
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_variables():
    assert find_cluster({"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2"}) == Cluster("t0:8476", 4, 2)
    ours = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert find_cluster(ours) == Cluster("10.0.0.2:1234", 2, 1)
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES=two"):
        find_cluster(ours | {"JAX_NUM_PROCESSES": "two"})
    with pytest.raises(ConfigError, match="process_id=2: expected 0 to 1"):
        find_cluster(ours | {"JAX_PROCESS_ID": "2"})


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--num_processes=2"], "give all three, or none"),
    (["--coordinator_address=host", "--num_processes=2", "--process_id=0"], "expected host:port"),
    (["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"], "process_id=2: expected 0 to 1"),
    (["--join_timeout=0"], "join_timeout=0.0"),
])  # fmt: skip
def test_impossible_flags(arguments, sentence):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    with pytest.raises(ConfigError, match=sentence):
        join(parser.parse_args(arguments), {})


def test_nobody_answers():
    with pytest.raises(ProcessError, match=r"process 0 at 127\.0\.0\.1:9 did not answer process 1 within 0\.5 s"):
        roll_call(Cluster("127.0.0.1:9", 2, 1), {}, 0.5)


def test_a_stranger_who_says_nothing_keeps_nobody_out(monkeypatch):
    monkeypatch.setattr("mpdit_jax.processes._LONGEST_SILENCE", 0.5)
    port, found = free_port(), {}

    def call(index):
        found[index] = roll_call(Cluster(f"127.0.0.1:{port}", 2, index), {}, 20.0)

    first = threading.Thread(target=call, args=(0,))
    first.start()
    for _ in range(100):
        with contextlib.suppress(OSError):
            stranger = socket.create_connection(("127.0.0.1", port + 1))
            break
        time.sleep(0.05)
    second = threading.Thread(target=call, args=(1,))
    second.start()
    for thread in (first, second):
        thread.join(15)
    stranger.close()
    assert {index: list(connections) for index, connections in found.items()} == {0: [1], 1: [0]}
    for connections in found.values():
        for connection in connections.values():
            connection.close()


def test_a_cloud_tpu_has_chips_and_their_library(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert not on_cloud_tpu(tmp_path)
    (tmp_path / "accel0").touch()
    assert on_cloud_tpu(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not on_cloud_tpu(tmp_path)


def test_processes_that_jax_connected_are_compared_too(monkeypatch):
    """On a TPU pod JAX finds the peers itself, so there is no roll call to compare in; what is known late, neither."""
    ours, others = {"config.seed": "0", "version": "1"}, []
    compare_facts(ours)  # alone

    def gathered(array):
        """As JAX stacks what every process gives: the length of its facts, then the facts."""
        if array.ndim == 0:
            return np.array([array, array, *map(len, others)])
        rows = [np.frombuffer(other, np.uint8) for other in others]
        width = max([len(array), *map(len, rows)])
        return np.stack([np.pad(row, (0, width - len(row))) for row in (array, array, *rows)])

    monkeypatch.setattr("mpdit_jax.processes.multihost_utils.process_allgather", gathered)
    compare_facts(ours)
    others.append(b'{"config.seed": "1", "version": "1"}')
    with pytest.raises(
        ProcessError, match=r"^process 2 was started with config.seed=1 instead of 0, unlike process 0:"
    ):
        compare_facts(ours)


WAITING = """
print("here", flush=True)
if options.process_id == 0:
    time.sleep(600)
"""


@pytest.fixture
def late_and_waiting():
    """A process that is late, and one that waits for it; both have joined."""
    both = start_joined(WAITING)
    for process in both:
        assert process.stdout.readline() == "here\n"
    time.sleep(0.5)  # from there to the wait
    yield both
    for process in both:
        process.kill()
        process.communicate()


def test_a_lost_process_ends_the_wait(late_and_waiting):
    late, waiting = late_and_waiting
    late.kill()
    _, stderr = waiting.communicate(timeout=20)
    assert waiting.returncode != 0
    assert "process 0 of 2 was lost" in stderr


def test_signals_end_the_wait(late_and_waiting):
    """JAX's preemption service would swallow SIGTERM."""
    for process, number in zip(late_and_waiting, (signal.SIGTERM, signal.SIGINT), strict=True):
        process.send_signal(number)
        assert process.stderr.readline() == f"{number.name}: stopped; the same command continues:\n"
