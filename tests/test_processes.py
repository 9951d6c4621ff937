"""How processes agree, and what ends their wait for each other."""

import argparse
import signal
import time

import jax
import jaxlib
import numpy as np
import pytest

import mpdit_jax
from mpdit_jax.distributed.processes import add_flags, assert_equal_across_processes, code_fingerprint, join
from mpdit_jax.errors import ConfigError, ProcessError
from tests.tiny import start_joined


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--num_processes=2"], "give all three, or none"),
    (["--coordinator_address=host", "--num_processes=2", "--process_id=0"], "expected host:port"),
    (["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"], "process_id=2: expected 0 to 1"),
    (["--join_timeout=0"], "join_timeout=0.0"),
    (["--join_timeout=inf"], "join_timeout=inf"),
    (["--join_timeout=nan"], "join_timeout=nan"),
    (["--join_timeout=1e10"], "join_timeout=10000000000.0"),
])  # fmt: skip
def test_impossible_flags(arguments, sentence):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    with pytest.raises(ConfigError, match=sentence):
        join(parser.parse_args(arguments), {})


def test_under_slurm_a_process_drives_all_gpus_of_its_node(monkeypatch):
    """JAX would give each process of a SLURM step one GPU: it may not look for the cluster once more."""
    step = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-4]"}
    for name, value in (step | {"SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(
        "mpdit_jax.distributed.processes.roll_call", lambda cluster, facts, timeout: asked.append(facts)
    )
    monkeypatch.setattr("mpdit_jax.distributed.processes.start_watch", lambda *arguments: None)
    monkeypatch.setattr("jax.distributed.initialize", lambda *given, **named: asked.append((given, named)))
    parser = argparse.ArgumentParser()
    add_flags(parser)
    join(parser.parse_args([]), {})
    facts, (given, named) = asked
    # Of every command: two installations would mix what they write.
    assert facts == {"version": mpdit_jax.__version__, "code": code_fingerprint(), "jax": jax.__version__} | {
        "jaxlib": jaxlib.__version__
    }
    assert given == ("n1:49166", 4, 1)
    assert named["cluster_detection_method"] == "deactivate"
    assert "local_device_ids" not in named


def test_facts_that_are_known_late_are_compared_too(monkeypatch):
    """What is known after the roll call."""
    ours, others = {"config.seed": "0", "version": "1"}, []
    assert_equal_across_processes(ours)  # alone

    def gathered(array):
        """As JAX stacks what every process gives: the length of its facts, then the facts."""
        if array.ndim == 0:
            return np.array([array, array, *map(len, others)])
        rows = [np.frombuffer(other, np.uint8) for other in others]
        width = max([len(array), *map(len, rows)])
        return np.stack([np.pad(row, (0, width - len(row))) for row in (array, array, *rows)])

    monkeypatch.setattr("mpdit_jax.distributed.processes.multihost_utils.process_allgather", gathered)
    assert_equal_across_processes(ours)
    others.append(b'{"config.seed": "1", "version": "1"}')
    with pytest.raises(
        ProcessError, match=r"^process 2 was started with config.seed=1 instead of 0, unlike process 0:"
    ):
        assert_equal_across_processes(ours)


WAITING = """
print("here", flush=True)
if options.process_id == 0:
    time.sleep(600)
"""


COUNTED = """
import socket
from mpdit_jax.distributed.processes import count_machines
print("machines:", count_machines(), flush=True)
socket.gethostname = lambda: f"machine {options.process_id}"
print("machines:", count_machines(), flush=True)
"""


@pytest.mark.slow
def test_machines_are_counted_by_name():
    for process in start_joined(COUNTED):
        stdout, stderr = process.communicate(timeout=100)
        counted = [line for line in stdout.splitlines() if not line.startswith("[Gloo]")]
        assert counted == ["machines: 1", "machines: 2"], stderr


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
