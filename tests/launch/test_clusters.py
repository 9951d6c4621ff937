"""The cluster scripts run the right commands with the right environment, tested without the services."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from mpdit_jax.config.flags import load_config_file
from mpdit_jax.distributed.startup import add_flags
from tests.tiny import command_main

ROOT = Path(__file__).resolve().parents[2]
TOPOLOGY = "cloud.google.com/gke-tpu-topology"
ARGUMENTS = ["--config=configs/digits.py", "--workdir=/shared/my runs/a"]


def run(script, *arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def stub(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("command", ["", "prepare"])
def test_slurm_starts_the_command_on_every_node(command, tmp_path):
    """A stub of `srun` records its command; this XLA knows every flag that the script sets."""
    stub(tmp_path / "bin", "srun", 'printf "%s\\n" "$@"; printf "%s\\n" "$XLA_FLAGS"')
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_JOB_NUM_NODES": "2", "COMMAND": command}
    job["SLURM_CPUS_PER_TASK"] = "12"
    done = run("slurm.sbatch", *ARGUMENTS, PATH=path, PYTHON="/opt/python", XLA_FLAGS="--xla_dump_to=", **job)
    assert done.returncode == 0, done.stderr
    first, *started, flags = done.stdout.splitlines()
    module = f"mpdit_jax.{command or 'train'}"
    assert first == "7: 2 node(s) gpu[1-2]"
    assert started == ["--kill-on-bad-exit=1", "--cpus-per-task=12", "/opt/python", "-u", "-m", module, *ARGUMENTS]
    if command:
        return
    assert flags.startswith("--xla_dump_to= --xla_gpu_enable_latency_hiding_scheduler=true")
    # XLA ends a process whose flags it does not know.
    script = "import jax, json; print(json.dumps(len(jax.devices())))"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    known = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert known.returncode == 0, known.stderr
    assert json.loads(known.stdout) == 1


def test_tpu_pod_quotes_for_both_shells():
    done = run("tpu_pod.sh", "my-pod", "us-west4-a", *ARGUMENTS, DRY_RUN="1", LIBTPU_INIT_ARGS="--a=1 --b=2")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert command[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-pod", "--zone=us-west4-a"]
    remote = shlex.split(command[-1].removeprefix("--command="))
    module = [".venv/bin/python", "-u", "-m", "mpdit_jax.train"]
    assert remote[-len(ARGUMENTS) - 4 :] == [*module, *ARGUMENTS]
    assert "LIBTPU_INIT_ARGS=--a=1 --b=2" in remote
    prepared = run("tpu_pod.sh", "my-pod", "us-west4-a", *ARGUMENTS, DRY_RUN="1", COMMAND="prepare")
    remote = shlex.split(shlex.split(prepared.stdout)[-1].removeprefix("--command="))
    assert remote[-len(ARGUMENTS) - 4 :] == [*module[:-1], "mpdit_jax.prepare", *ARGUMENTS]


@pytest.mark.parametrize("command", ["train", "prepare", "sample", "evaluate"])
def test_every_command_that_the_scripts_name_runs_on_many_processes(command, capsys):
    for script in ("slurm.sbatch", "tpu_pod.sh"):
        header, *started = (ROOT / "launch" / script).read_text().split('"mpdit_jax.${COMMAND:-train}"')
        (listed,) = re.findall(r"COMMAND=train \(the default\), (.*?) starts", header)
        assert command in ("train", *re.findall(r"prepare|sample|evaluate", listed))
        assert len(started) == 1
    with pytest.raises(SystemExit) as done:
        command_main(command)(["--help"])
    assert done.value.code == 0
    assert "--num_processes" in capsys.readouterr().out


def test_jobsets_describe_the_cluster_that_the_command_finds(monkeypatch):
    import yaml

    gpu, tpu = yaml.safe_load_all((ROOT / "launch/k8s_jobset.yaml").read_text())
    for jobset in (gpu, tpu):
        assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        [workers] = jobset["spec"]["replicatedJobs"]
        job = workers["template"]["spec"]
        assert (job["completionMode"], job["parallelism"]) == ("Indexed", job["completions"])
        [container] = job["template"]["spec"]["containers"]
        assert container["command"] == ["python", "-u", "-m", "mpdit_jax.train"]
        config = container["args"][0].removeprefix("--config=")
        assert load_config_file(config).model
    job = gpu["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    values = {entry["name"]: entry.get("value", "1") for entry in container["env"]}  # the second pod's index
    assert "job-completion-index" in str(container["env"])
    name = gpu["metadata"]["name"]
    monkeypatch.setattr(os, "environ", values)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    found = vars(parser.parse_args([]))
    assert found["coordinator_address"] == f"{name}-workers-0-0.{name}:12345"
    assert (found["num_processes"], found["process_id"]) == (job["completions"], 1)
    assert {port["containerPort"] for port in container["ports"]} == {12345, 12346}
    job = tpu["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    chips = prod(int(side) for side in job["template"]["spec"]["nodeSelector"][TOPOLOGY].split("x"))
    assert chips == job["completions"] * container["resources"]["limits"]["google.com/tpu"]
    assert [entry["containerPort"] for entry in container["ports"]] == [8482]  # JAX's on Cloud TPU
    slurm = (ROOT / "launch/slurm.sbatch").read_text()
    assert all(flag in slurm for flag in values["XLA_FLAGS"].split())


def test_what_is_missing_is_said(tmp_path):
    assert "expected NAME ZONE ARGUMENTS" in run("tpu_pod.sh", "my-pod").stderr
    for number in ("two", "0", "00"):
        assert f"N={number}: expected a number of processes" in run("local_multiprocess.sh", number, "train").stderr
    assert "no command was given" in run("local_multiprocess.sh", "2").stderr
    assert "does not run" in run("local_multiprocess.sh", "2", "train", PYTHON=str(tmp_path / "none")).stderr
