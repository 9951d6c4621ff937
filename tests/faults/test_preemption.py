"""SIGTERM and SIGINT at any moment end a run saved with status 0, or at once, and damage nothing."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from PIL import Image

from mpdit_jax.checkpoint.reader import list_steps
from mpdit_jax.errors import InputError
from mpdit_jax.train.__main__ import main
from tests.faults.fork_server import wait_until
from tests.tiny import ROOT, assert_same_bits, environment, run, saved_arrays, start, train_arguments

LONG = ["--config.steps=100000", "--config.checkpoint.every=100000", "--config.log.every=5"]

VAE = [
    f"--config={ROOT / 'configs/vae_fashion.py'}", "--config.steps=100000", "--config.checkpoint.every=100000",
    "--config.batch_size=4", "--config.data.image_size=8", "--config.model.block_out_channels=8,8",
    "--config.model.norm_num_groups=4",
]  # fmt: skip


def handles(pid, number):
    """Return whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) & 1 << (number - 1))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_while_libraries_are_imported(tmp_path, number, status):
    """A signal during the imports, which take seconds, ends the command with a sentence and no traceback."""
    process = start("train", train_arguments(tmp_path / "run"))
    while not handles(process.pid, signal.SIGTERM):  # Python itself may still be starting
        time.sleep(0.001)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (status, "")
    assert "Traceback" not in stderr
    assert "mpdit_jax.train --config=" in stderr  # the command that starts the run again
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_before_the_first_step(fork_server, tmp_path):
    """SIGTERM ends a run without a step at once, also while XLA compiles."""
    alone = "--config.model.hidden_size=24"  # no other test has compiled its step
    child = fork_server.start("train", train_arguments(tmp_path / "run", *LONG, alone))
    wait_until(lambda: "starting at step 0" in child.text(), child)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 0
    assert "continue with:\n  " in child.text()
    assert list_steps(tmp_path / "run") in ([], [1], [2])  # as a rule the signal comes before the first step


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_vae_before_its_first_step(fork_server, tmp_path, number):
    """SIGTERM ends it at once; Ctrl-C ends it before its first step or after it."""
    (tmp_path / "images" / "one").mkdir(parents=True)
    for index in range(8):
        Image.new("L", (8, 8), 30 * index).save(tmp_path / "images" / "one" / f"{index}.png")
    workdir = tmp_path / "run"
    child = fork_server.start(
        "train_vae", [*VAE, f"--config.data.images={tmp_path / 'images'}", f"--workdir={workdir}"]
    )
    wait_until(lambda: (workdir / "config.json").exists(), child)
    os.kill(child.pid, number)
    assert child.wait() == 0, child.text()
    assert "continue with:\n  " in child.text()
    steps = list_steps(workdir)
    if steps:
        assert f"stopped at step {steps[0]} of 100000, saved" in child.text()
    else:
        assert "with nothing trained yet" in child.text() or "SIGTERM: no step was done since" in child.text()


@pytest.mark.slow
def test_saved_within_the_grace_period(fork_server, tmp_path):
    workdir = tmp_path / "run"
    child = fork_server.start("train", train_arguments(workdir, *LONG, "--config.checkpoint.grace=60"))
    wait_until(lambda: "\nstep 5/" in child.text(), child)
    since = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 0
    assert time.monotonic() - since < 60
    (step,) = list_steps(workdir)
    assert f"stopped at step {step} of 100000, saved; continue with:" in child.text()


@pytest.mark.slow
def test_another_status_for_schedulers_to_whom_0_is_the_end(tmp_path):
    """MPDIT_JAX_STOPPED_STATUS=75 replaces status 0, after which Kubernetes would not start the run again."""
    process = start("train", train_arguments(tmp_path / "run", *LONG), extra={"MPDIT_JAX_STOPPED_STATUS": "75"})
    for line in process.stdout:
        if "\nstep 5/" in f"\n{line}":
            break
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "saved; continue with:" in stdout


def test_a_status_that_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPDIT_JAX_STOPPED_STATUS", "256")
    with pytest.raises(InputError, match="MPDIT_JAX_STOPPED_STATUS=256: expected an exit status from 0 to 255"):
        main(train_arguments(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_whoever_reads_the_output_goes_away(tmp_path):
    """A broken pipe, as of a lost connection, stops the run: it is saved, and prints nothing about it."""
    workdir = tmp_path / "run"
    process = start("train", train_arguments(workdir, *LONG))
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""
    process.stderr.close()
    [step] = list_steps(workdir)
    assert 5 < step < 100_000
    status, stdout, _ = run("train", train_arguments(workdir, f"--config.steps={step + 1}"))
    assert status == 0
    assert f"continuing at step {step}" in stdout


# Fills the disk under the output when the first line of the log has been written.
FILLS = """
import os, threading, time
def fill():
    while not (os.path.exists({metrics!r}) and os.path.getsize({metrics!r})):
        time.sleep(0.01)
    for stream in {streams}:
        os.dup2(os.open("/dev/full", os.O_WRONLY), stream)
threading.Thread(target=fill, daemon=True).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize("streams", [(1,), (1, 2)])
def test_a_disk_that_takes_no_more_of_the_output(tmp_path, streams):
    """A full disk under the output stops the run: it is saved in its workdir on another disk."""
    workdir = tmp_path / "run"
    before = FILLS.format(metrics=str(workdir / "metrics.jsonl"), streams=streams)
    process = start("train", train_arguments(workdir, *LONG), before=before)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    if streams == (1,):
        assert stderr == "error: the system refused to read or write (No space left on device).\n"
    (step,) = list_steps(workdir)
    assert 0 < step < 100_000


def read_until(terminal, mark):
    """Read what is shown on a terminal up to a mark."""
    said, end = b"", time.monotonic() + 60
    while mark not in said:
        assert select.select([terminal], [], [], end - time.monotonic())[0], said
        said += os.read(terminal, 1024)


@pytest.mark.slow
def test_the_terminal_is_closed(tmp_path):
    """SIGHUP and failing prints, as when a laptop is shut, stop the run: it is saved."""
    workdir = tmp_path / "run"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mpdit_jax.train", *train_arguments(workdir, *LONG)],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    read_until(ours, b"images/s")
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    (step,) = list_steps(workdir)
    assert 0 < step < 100_000


@pytest.mark.slow
def test_a_terminal_that_is_closed_on_whoever_ignores_it(tmp_path):
    """Under nohup without a file for the output, the first failing print stops the run: it is saved."""
    workdir = tmp_path / "run"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mpdit_jax.train", *train_arguments(workdir, *LONG)],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    os.close(theirs)
    read_until(ours, b"images/s")
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert list_steps(workdir)


@pytest.mark.slow
def test_a_grace_period_that_is_too_short(fork_server, tmp_path):
    """The run ends in time and says so, and the older checkpoint is unchanged."""
    workdir = tmp_path / "run"
    fork_server.run("train", train_arguments(workdir, "--config.steps=4"))
    before = saved_arrays(workdir, 4)
    child = fork_server.start("train", train_arguments(workdir, *LONG, "--config.checkpoint.grace=1e-6"))
    wait_until(lambda: "\nstep 5/" in child.text(), child)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 1
    assert "could not be saved within 1e-06 s (config.checkpoint.grace); the checkpoint of step 4" in child.text()
    assert_same_bits(before, saved_arrays(workdir, 4))


@pytest.mark.slow
def test_a_second_signal_ends_at_once(fork_server, tmp_path):
    """The second signal may come during the last save; the run continues from the checkpoint before it."""
    workdir = tmp_path / "run"
    fork_server.run("train", train_arguments(workdir, "--config.steps=4"))
    before = saved_arrays(workdir, 4)
    child = fork_server.start("train", train_arguments(workdir, *LONG))
    wait_until(lambda: "\nstep 5/" in child.text(), child)
    os.kill(child.pid, signal.SIGTERM)
    wait_until(lambda: "SIGTERM: saving step" in child.text(), child)
    since = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    status = child.wait()
    assert status in (0, 143)  # 0 if the save was quicker
    if status == 143:
        assert "SIGTERM again: ended at once; the checkpoint of step" in child.text()
        assert time.monotonic() - since < 10
    assert_same_bits(before, saved_arrays(workdir, 4))
    reached = list_steps(workdir)[-1]
    output = fork_server.run("train", train_arguments(workdir, f"--config.steps={reached + 1}"))
    assert f"continuing at step {reached}" in output


# Delays a save when all files of the checkpoint are written, before it gets its name.
SLOW = """
import time
import orbax.checkpoint as ocp
finalize = ocp.PyTreeCheckpointHandler.finalize
def slow(self, directory):
    time.sleep(30)
    finalize(self, directory)
ocp.PyTreeCheckpointHandler.finalize = slow
"""


@pytest.mark.slow
def test_a_second_signal_in_the_middle_of_a_save(fork_server, tmp_path):
    workdir = tmp_path / "run"
    fork_server.run("train", train_arguments(workdir, "--config.steps=4"))
    before = saved_arrays(workdir, 4)
    process = start("train", train_arguments(workdir, *LONG), before=SLOW)
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGTERM)
    while not list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*/parameters*/**/d/*")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)  # two signals at the same moment count as one request
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)  # of the 30 s that the save still takes
    assert process.returncode == 143
    assert "SIGTERM again: ended at once; the checkpoint of step 4 is safe" in stderr
    assert list_steps(workdir) == [4]
    assert_same_bits(before, saved_arrays(workdir, 4))
    assert "continuing at step 4" in fork_server.run("train", train_arguments(workdir, "--config.steps=5"))
    assert list_steps(workdir) == [4, 5]
    assert not list((workdir / "checkpoints").glob("*tmp*"))


SLEEPER = """
import os, signal, time
from mpdit_jax.runtime.signals import PreemptionHandler
with PreemptionHandler(grace=float({grace}), saved=lambda: "the checkpoint of step 7") as stop:
    print("ready", flush=True)
    # While the main thread is inside a library, Python runs no handler there; the thread of PreemptionHandler does.
    import ctypes
    for _ in range(20):
        ctypes.CDLL(None).usleep(900000)
"""


UNHEARD = """
import os, signal, sys, time
from mpdit_jax.runtime.signals import PreemptionHandler
with PreemptionHandler(saved=lambda: "nothing") as stop:
    sys.stdin.readline()
    print("nobody reads this", flush=True)
    assert stop.name == "nobody reads the output any more", stop.name
    for _ in range(2):  # to the process and to its group, as `timeout` does
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    time.sleep(0.5)
    os.write(2, f"saving, {stop.name}".encode())
    os._exit(7)
"""


def test_one_signal_is_no_second_one():
    """A signal after the output was closed, or delivered twice at once, counts as the first: the save goes on."""
    process = subprocess.Popen(
        [sys.executable, "-c", UNHEARD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    process.stdout.close()
    _, stderr = process.communicate("go\n", timeout=60)
    assert (process.returncode, stderr) == (7, "saving, SIGTERM")


CLOSED = """
import io, sys
from mpdit_jax.runtime.signals import PreemptionHandler
sys.stdout = io.TextIOWrapper(io.BytesIO())
with PreemptionHandler():
    kept = sys.stdout
sys.stdout.close()
del kept
"""


def test_a_stream_that_was_closed_is_not_flushed_at_the_end():
    """Python 3.13 warns of it; older versions warn in development mode."""
    found = subprocess.run(
        [sys.executable, "-X", "dev", "-c", CLOSED], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(("grace", "signals", "status", "sentence"), [
    (0.5, 1, 1, "could not be saved within 0.5 s"),
    (0, 2, 143, "SIGTERM again: ended at once; the checkpoint of step 7 is safe."),
])  # fmt: skip
def test_signals_are_heeded_while_a_library_works(grace, signals, status, sentence):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER.format(grace=grace)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    since = time.monotonic()
    _, stderr = process.communicate(timeout=15)
    assert time.monotonic() - since < 10
    assert process.returncode == status
    assert sentence in stderr
