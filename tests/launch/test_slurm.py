"""`launch/slurm.sbatch` on a real SLURM whose three nodes are all this machine.

apt-get install slurm-wlm munge procps
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests.tiny import ROOT, free_port, train_arguments

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "scancel", "sinfo", "pgrep")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(shutil.which(program, path=PATH) for program in PROGRAMS), reason="SLURM is not installed"
    ),
]
# Names that every Linux finds on itself. The first is not used: processes would meet there by accident. So would jobs
# of the same number, of clusters that run side by side: each numbers its own from its port on.
NODES = "127.0.0.[2-4]"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
KillWait=60
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=64 CoresPerSocket=64 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """Return the commands of the cluster in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def __call__(self, *command, **variables):
        done = self.run(*command, **variables)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def run(self, *command, **variables):
        """Run a command that may fail."""
        return subprocess.run(
            command, env=self.environment | variables, cwd=ROOT, capture_output=True, text=True, check=False
        )

    def submit(self, *arguments):
        """Submit the script from the repository's root and return the job's number."""
        out = self.folder / "job-%j.log"
        said = self(
            "sbatch", f"--output={out}", "--nodes=2", "launch/slurm.sbatch", *arguments,
            JAX_PLATFORMS="cpu", PYTHON=sys.executable, XLA_FLAGS="",
        )  # fmt: skip
        return re.search(r"Submitted batch job (\d+)", said)[1]

    def job(self, number):
        """Return what SLURM knows about a job."""
        return dict(re.findall(r"(\S+?)=(\S+)", self("scontrol", "show", "job", number)))

    def log(self, number):
        path = self.folder / f"job-{number}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, number, what, seconds=180):
        """Wait until `what(job, log)` holds."""
        end = time.monotonic() + seconds
        while not what(self.job(number), self.log(number)):
            assert time.monotonic() < end, self.log(number)
            time.sleep(0.5)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    cluster, host, port = Slurm(folder), socket.gethostname().partition(".")[0], free_port(4)
    values = {"folder": folder, "host": host, "user": getpass.getuser(), "nodes": NODES}
    values |= {"port": port, "first": port + 1, "last": port + 3}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
    for number in range(8):  # what stands for a GPU's device must be different files
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"NodeName={NODES} Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    munge += [f"--key-file={key}", "--force", "--foreground"]
    nodes = [f"127.0.0.{number}" for number in (2, 3, 4)]
    for node in nodes:
        (folder / f"spool.{node}").mkdir()
    daemons = []
    try:
        for command in (["munged", *munge], ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in nodes)):
            daemons.append(
                subprocess.Popen(command, env=cluster.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            time.sleep(1)
        end = time.monotonic() + 60
        while cluster.run("sinfo", "--noheader", "--format=%T %D").stdout.split() != ["idle", "3"]:
            assert time.monotonic() < end, "".join(path.read_text() for path in folder.glob("slurm*.log"))
            time.sleep(1)
        yield cluster
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            daemon.wait(timeout=60)


def test_what_the_script_asks_for(slurm):
    number = slurm.submit("--help")
    slurm.wait(number, lambda job, log: job["JobState"] == "COMPLETED")
    job = slurm.job(number)
    assert (job["JobName"], job["NumNodes"], job["Requeue"]) == ("mpdit", "2", "1")
    assert (job["CPUs/Task"], job["NtasksPerN:B:S:C"]) == ("32", "1:0:*:*")
    assert job["TresPerNode"].replace("/", ":") == "gres:gpu:8"  # newer versions write gres/gpu:8
    assert job["TimeLimit"] == "1-00:00:00"
    assert slurm.log(number).count("usage: python -m mpdit_jax.train") == 2


def test_a_job_of_two_nodes_that_is_put_back_continues(slurm, tmp_path):
    """A requeued job is saved, waits and continues in the same log; a cancelled one is saved too."""
    arguments = train_arguments(tmp_path / "run", "--config.steps=1000000", "--config.checkpoint.every=1000000")
    number = slurm.submit(*arguments, "--config.log.every=20")
    slurm.wait(number, lambda job, log: "step 40/" in log)
    slurm("scontrol", "requeue", number)
    slurm.wait(number, lambda job, log: job["JobState"] == "PENDING")
    first = slurm.log(number)
    assert "2 cpu device(s) of 2 processes" in first
    assert re.search(r"SIGTERM: saving step (\d+)\nstopped at step \1 of 1000000, saved", first)
    slurm("scontrol", "update", f"jobid={number}", "starttime=now")  # it would wait for two minutes
    slurm.wait(number, lambda job, log: log.count("images/s") > first.count("images/s"))
    log = slurm.log(number)
    assert log.startswith(first)
    stopped = re.search(r"stopped at step (\d+)", first)[1]
    assert f"continuing at step {stopped} in" in log
    slurm("scancel", number)
    slurm.wait(number, lambda job, log: job["JobState"] == "CANCELLED" and log.count("stopped at step") == 2)


def test_a_process_that_dies_ends_the_job(slurm, tmp_path):
    arguments = train_arguments(tmp_path / "run", "--config.steps=1000000", "--config.log.every=20")
    number = slurm.submit(*arguments)
    slurm.wait(number, lambda job, log: "step 40/" in log)
    processes = subprocess.run(
        ["pgrep", "-f", f"^{sys.executable}.*{tmp_path}"], capture_output=True, text=True, check=True
    )
    os.kill(int(processes.stdout.split()[-1]), 9)
    slurm.wait(number, lambda job, log: job["JobState"] == "FAILED")
