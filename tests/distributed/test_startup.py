"""Processes find each other, compare what they run, and end when one of them is missing or lost."""

import argparse
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jaxlib
import pytest

import mpdit_jax
from mpdit_jax.distributed import collectives, startup
from mpdit_jax.distributed.startup import add_flags, code_fingerprint, join, own_flags
from mpdit_jax.errors import ConfigError, ProcessError
from tests.tiny import environment, free_port, join_flags, start_joined


def options_of(*arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--num_processes=2"], "give all three, or none"),
    (["--coordinator_address=host", "--num_processes=2", "--process_id=0"], "expected host:port"),
    (["--coordinator_address=h:1", "--num_processes=0", "--process_id=0"], "num_processes=0: expected 1 or more"),
    (["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"], "process_id=2: expected 0 to 1"),
    (["--initialization_timeout=0"], "initialization_timeout=0"),
    (["--heartbeat_timeout=-1"], "heartbeat_timeout=-1"),
    (["--heartbeat_timeout=10000000000"], "heartbeat_timeout=10000000000"),
])  # fmt: skip
def test_impossible_flags(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        join(options_of(*arguments), {})


def test_flags_that_connect_processes_may_differ():
    first, second = (
        options_of(f"--coordinator_address={host}:1", f"--process_id={index}", f"--heartbeat_timeout={10 + index}")
        for index, host in enumerate(("localhost", "node7"))
    )
    first.steps, second.steps, first.threads, second.threads = 2, 2, 1, 4
    assert own_flags(first, but=["threads"]) == own_flags(second, but=["threads"]) == {"--steps": "2"}
    assert own_flags(first) != own_flags(second)


def test_variables_stand_in_for_flags(monkeypatch, capsys):
    for name, value in (("COORDINATOR_ADDRESS", "h:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "1")):
        monkeypatch.setenv(f"JAX_{name}", value)
    options = options_of("--process_id=0")
    assert (options.coordinator_address, options.num_processes, options.process_id) == ("h:1", 2, 0)
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(SystemExit):
        options_of()
    assert "argument --process_id: invalid int value: 'one'" in capsys.readouterr().err


STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "4",
}  # fmt: skip


@pytest.mark.parametrize(("variables", "devices"), [
    ({}, "alone"),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "alone"),  # an allocation without a step
    (STEP | {"SLURM_NTASKS": "1"}, "alone"),
    (STEP, "all"),
    (STEP | {"SLURM_NTASKS": "32"}, "one"),
    ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "alone"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "all"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "one"),
])  # fmt: skip
def test_a_process_that_has_its_node_to_itself_uses_all_its_gpus(monkeypatch, variables, devices):
    """The command tells JAX so when JAX finds the cluster; JAX alone would give each process one GPU."""
    asked = []
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: asked.append(arguments))
    join(options_of("--initialization_timeout=5", "--heartbeat_timeout=7"), {})
    if devices == "alone":
        assert not asked
        return
    (arguments,) = asked
    assert (arguments["local_device_ids"], arguments["heartbeat_timeout_seconds"]) == (
        [] if devices == "all" else None,
        7,
    )
    assert "cluster_detection_method" not in arguments


# Prints what JAX finds by the variables of a launcher, before any backend is initialized.
FOUND = """
import argparse, os
import jax
from mpdit_jax.distributed import startup
startup.assert_equal_across_processes = lambda values: None
parser = argparse.ArgumentParser()
startup.add_flags(parser)
startup.join(parser.parse_args([]), {})
print(jax.distributed.is_initialized(), jax.config.read("jax_cuda_visible_devices"))
"""
ONE_HOST = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}
SLICE = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1", "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1"}
SLICE |= {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0", "JAX_PLATFORMS": "tpu,cpu", "TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize(("variables", "each", "said"), [
    (ONE_HOST | {"SLURM_STEP_NUM_NODES": "2"}, ("SLURM_PROCID", "SLURM_LOCALID"), ["True all", "True all"]),
    (ONE_HOST | {"SLURM_STEP_NUM_NODES": "1"}, ("SLURM_PROCID", "SLURM_LOCALID"), ["True 0", "True 1"]),
    (OPEN_MPI, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"), ["True 0", "True 1"]),
    (SLICE | {"JAX_FORCE_TPU_INIT": "1"}, ("TPU_WORKER_ID",), ["True all", "True all"]),
    (SLICE, ("TPU_WORKER_ID",), ["False all", "False all"]),  # a machine that has no TPU
    (SLICE | {"JAX_FORCE_TPU_INIT": "1", "JAX_PLATFORMS": "cpu"}, ("TPU_WORKER_ID",), ["False all", "False all"]),
])  # fmt: skip
def test_jax_finds_the_cluster(variables, each, said):
    """JAX finds the processes by the variables of SLURM, Open MPI and GKE; a machine of a slice may work by itself."""
    everybody = environment() | {"JAX_COORDINATOR_PORT": str(free_port())} | variables
    both = [
        subprocess.Popen(
            [sys.executable, "-c", FOUND],
            env=everybody | dict.fromkeys(each, str(index)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=100) for process in both]
    assert [stdout.strip() for stdout, _ in outputs] == said, outputs
    assert [process.returncode for process in both] == [0, 0], outputs


def test_a_launcher_that_jax_does_not_know():
    """JAX does not know Open MPI's launcher from version 5 on; the four processes must not train four times."""
    everybody = environment() | {"OMPI_COMM_WORLD_SIZE": "4"}
    done = subprocess.run([sys.executable, "-c", FOUND], env=everybody, capture_output=True, text=True, check=False)
    assert done.returncode
    assert re.search("coordinator_address should be defined.*give --coordinator_address", done.stderr), done.stderr


def test_what_every_command_compares(monkeypatch):
    """The versions of the code and of JAX are compared with the command's own values."""
    compared = []
    monkeypatch.setattr(startup, "assert_equal_across_processes", compared.append)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    join(options_of(), {"--seed": "0"})
    (values,) = compared
    assert values == {"--seed": "0", "version": mpdit_jax.__version__, "code": code_fingerprint()} | {
        "jax": jax.__version__, "jaxlib": jaxlib.__version__
    }  # fmt: skip


def test_the_code_of_a_wheel_and_of_a_checkout_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "distributed").mkdir()
    (tmp_path / "distributed/startup.py").write_text("code")
    monkeypatch.setattr(startup, "__file__", str(tmp_path / "distributed/startup.py"))
    before = code_fingerprint()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/mine.py").write_text("a config")  # only a wheel has it there
    assert code_fingerprint() == before
    (tmp_path / "more.py").touch()
    assert code_fingerprint() != before


def test_differences_are_named(monkeypatch):
    ours = {"config.seed": "0", "version": "1"}
    collectives.assert_equal_across_processes(ours)  # alone
    others = [ours, ours | {"config.seed": "1"}, {f"config.f{number}": "1" for number in range(8)}]
    monkeypatch.setattr(collectives, "gather", lambda values: [values, *others])
    with pytest.raises(ProcessError) as caught:
        collectives.assert_equal_across_processes(ours, remedy="do this")
    assert str(caught.value) == (
        "process 2 was started with config.seed=1 instead of 0, unlike process 0; process 3 was started with "
        "config.f0=1 instead of None, config.f1=1 instead of None, config.f2=1 instead of None, config.f3=1 instead of "
        "None, config.f4=1 instead of None and 5 more, unlike process 0: do this."
    )


TOGETHER = """
import socket
from mpdit_jax.distributed.collectives import (
    any_process, broadcast, count_machines, first_sentence, gather, run_on_process_0
)
index = options.process_id
print(gather("x" * 1000 * index) == ["x" * 1000 * other for other in range(options.num_processes)])
print(broadcast(index + 7), any_process(index == 1), any_process(False), count_machines())
print(first_sentence("" if index == 0 else f"from {index}", "here"), run_on_process_0(lambda: "done"))
socket.gethostname = lambda: f"machine {index}"
print(count_machines())
run_on_process_0(lambda: [][index])
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_collectives(count):
    """The script ends with a bug on process 0, which prints a traceback; the others end because process 0 did."""
    for index, process in enumerate(start_joined(TOGETHER, count)):
        stdout, stderr = process.communicate(timeout=100)
        lines = [line for line in stdout.splitlines() if not line.startswith("[Gloo]")]
        assert lines == ["True", "7 True False 1", f"from 1 {None if index else 'done'}", str(count)], stderr
        assert process.returncode == (1 if index == 0 else -signal.SIGABRT)
        assert ("IndexError" in stderr) == (index == 0)


WAITING = """
print("here", flush=True)
if options.process_id == 0:
    time.sleep(600)
"""


@pytest.fixture
def late_and_waiting():
    """Two joined processes: the first is late for a barrier at which the second waits."""
    both = start_joined(WAITING)
    for process in both:
        while process.stdout.readline() != "here\n":
            assert process.poll() is None, process.communicate()
    time.sleep(0.5)  # until it waits at the barrier
    yield both
    for process in both:
        process.kill()
        process.communicate()


def test_signals_end_the_wait(late_and_waiting):
    """SIGTERM and SIGINT end a process that is late for a barrier and one that waits there."""
    for process, number in zip(late_and_waiting, (signal.SIGTERM, signal.SIGINT), strict=True):
        process.send_signal(number)
        assert process.stderr.readline() == f"{number.name}: stopped; the same command continues:\n"


@pytest.mark.slow
def test_a_signal_ends_the_start():
    """SIGINT ends process 0 while it waits inside JAX for the others to join."""
    script = textwrap.dedent(
        """
        from mpdit_jax.runtime import cli
        from mpdit_jax.distributed.startup import join
        from tests.distributed.test_startup import options_of
        def main(arguments):
            print("here", flush=True)
            join(options_of(*arguments), {})
        cli.run(main)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *join_flags(free_port(), 2, 0)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "here\n"
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.startswith("SIGINT: stopped; the same command continues:\n")
