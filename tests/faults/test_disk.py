"""A full or read-only disk and a deleted or replaced workdir end a run with a sentence, and nothing is overwritten."""

import os
import re
import shutil
import signal
import socket
import subprocess

import pytest
from PIL import Image

from mpdit_jax.checkpoint.reader import list_steps
from mpdit_jax.errors import CheckpointError, InputError
from mpdit_jax.io.locked_folder import Job, LockedFolder
from mpdit_jax.train.__main__ import main
from mpdit_jax.train.logger import RunLogger
from tests.faults.fork_server import wait_until
from tests.prepare.conftest import make_vae
from tests.tiny import assert_same_bits, saved_arrays, train_arguments

EVERY = ["--config.steps=12", "--config.checkpoint.every=1", "--config.checkpoint.keep=100", "--config.log.every=1"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, and a function that changes its options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )

    done = mount("size=4m") if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"mounting a small file system needs root: {done.stderr.strip() if done else 'no mount command'}")
    try:
        yield place, lambda options: mount(f"remount,{options}").check_returncode()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def only_sentence(text):
    """Return the one sentence that a failed command printed; Orbax and TensorStore may print tracebacks beside it."""
    (sentence,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return sentence


def at_step_ten(fork_server, workdir, saved_every):
    """Start a long training, and wait for the first line of its log."""
    long = ["--config.steps=100000", f"--config.checkpoint.every={saved_every}", "--config.log.every=10"]
    child = fork_server.start("train", train_arguments(workdir, *long))
    wait_until(lambda: "\nstep 10/" in child.text(), child)
    return child


@pytest.mark.slow
def test_disk_full(fork_server, small_disk, tmp_path):
    """The run ends with a sentence and undamaged checkpoints, and with more room continues to the same bits."""
    place, remount = small_disk
    child = fork_server.start("train", train_arguments(place / "run", *EVERY))
    assert child.wait() == 1
    assert "No space left on device" in only_sentence(child.text())
    kept = list_steps(place / "run")
    assert kept
    assert kept[-1] < 12
    remount("size=64m")
    assert f"continuing at step {kept[-1]}" in fork_server.run("train", train_arguments(place / "run", *EVERY))
    fork_server.run("train", train_arguments(tmp_path / "other", *EVERY))
    assert_same_bits(saved_arrays(tmp_path / "other", 12), saved_arrays(place / "run", 12))
    assert (tmp_path / "other" / "metrics.jsonl").read_bytes() == (place / "run" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_files_that_may_not_grow(fork_server, tmp_path):
    """A limit on the size of files, as a quota sets it, ends the run at its first checkpoint with a sentence."""
    limited = ["--config.model.hidden_size=64"]
    workdir = tmp_path / "run"
    child = fork_server.start("train", train_arguments(workdir, *limited), largest_file=200_000)
    assert child.wait() == 1
    assert "File too large" in only_sentence(child.text())
    assert list_steps(workdir) == []


def test_a_store_that_may_not_grow(fork_server, tmp_path):
    """A limit on the size of files ends `prepare`; without it the same command finishes the store."""
    images = tmp_path / "images" / "one"
    images.mkdir(parents=True)
    for number in range(40):
        Image.new("L", (8, 8), number).save(images / f"{number}.png")
    vae = make_vae(tmp_path / "vae", seed=0)
    arguments = [
        f"--images={images.parent}", f"--vae={vae}", "--image_size=8", "--batch_size=8", f"--out={tmp_path / 'store'}"
    ]  # fmt: skip
    child = fork_server.start("prepare", arguments, largest_file=4096)
    assert child.wait() == 1
    assert re.search(r"cannot write .*shard-00000-of-00001\.array_record: File too large", only_sentence(child.text()))
    assert not list((tmp_path / "store").glob("*shard*"))
    fork_server.run("prepare", arguments)
    fork_server.run("prepare", ["--verify", f"--out={tmp_path / 'store'}"])


def test_read_only_directory(fork_server, small_disk):
    place, remount = small_disk
    fork_server.run("train", train_arguments(place / "run", "--config.steps=1"))
    remount("size=4m,ro")
    before = sorted(path for path in place.rglob("*"))
    for workdir in (place / "run", place / "new"):
        child = fork_server.start("train", train_arguments(workdir))
        assert child.wait() == 1
        assert "Read-only file system; choose another place." in only_sentence(child.text())
    assert before == sorted(path for path in place.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_workdir_deleted_during_the_run(fork_server, tmp_path, replaced):
    """The run ends at its next line of the log, and writes nothing into a folder of the same name."""
    workdir = tmp_path / "run"
    child = at_step_ten(fork_server, workdir, saved_every=100)
    workdir.rename(tmp_path / "moved")
    if replaced:
        workdir.mkdir()
        (workdir / "notes.txt").write_text("mine")
    assert child.wait() == 1
    assert f"{workdir} was deleted, moved or replaced while the training was writing to it" in only_sentence(
        child.text()
    )
    assert [path.name for path in workdir.glob("*")] == (["notes.txt"] if replaced else [])


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_workdir_deleted_with_all_that_is_in_it(fork_server, tmp_path, replaced):
    """A save in progress may make its own folders again; nothing else is written."""
    workdir = tmp_path / "run"
    child = at_step_ten(fork_server, workdir, saved_every=1)
    while workdir.exists():
        shutil.rmtree(workdir, ignore_errors=True)  # the run may write files meanwhile
    if replaced:
        workdir.mkdir(exist_ok=True)
        (workdir / "notes.txt").write_text("mine")
    assert child.wait() == 1
    sentence = only_sentence(child.text())
    assert f"{workdir} was deleted, moved or replaced" in sentence or "a checkpoint cannot be written" in sentence
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    assert [path.name for path in workdir.glob("*")] == (["notes.txt"] if replaced else [])
    assert not replaced or (workdir / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("written", ["the grid", "an evaluation"])
def test_what_takes_the_workdirs_place_gets_nothing_of_the_old_run(tmp_path, monkeypatch, written):
    """Grids and evaluations are not written into a folder that has replaced the workdir."""
    workdir = tmp_path / "run"

    def replace(step):
        if step == 2:
            workdir.rename(tmp_path / "moved")
            workdir.mkdir()

    advance = RunLogger.advance
    monkeypatch.setattr(RunLogger, "advance", lambda self, step: (advance(self, step), replace(step)))
    more = ["--config.log.every=100", "--config.checkpoint.every=100"]
    more += ["--config.sample.every=2"] if written == "the grid" else ["--config.eval.every=2"]
    with pytest.raises(CheckpointError, match="was deleted, moved or replaced while the training was writing to it"):
        main(train_arguments(workdir, *more))
    assert not list(workdir.iterdir())


@pytest.mark.slow
def test_the_owner_of_a_lock_is_named(fork_server, tmp_path):
    """The second run names the first; a killed first run leaves no lock that has to be removed."""
    workdir, long = tmp_path / "run", ["--config.steps=100000", "--config.log.every=10"]
    child = fork_server.start("train", train_arguments(workdir, *long))
    wait_until(lambda: "starting at step" in child.text(), child)
    with pytest.raises(CheckpointError, match=f"process {child.pid} on {socket.gethostname()} since 20.* UTC"):
        main(train_arguments(workdir, *long))
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    fork_server.run("train", train_arguments(workdir, "--config.steps=2"))


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import errno
    import fcntl

    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match=r"cannot lock .*\.lock \(No locks available\)"):
        LockedFolder(tmp_path, Job("run", "writing to", "use another --out"))
