"""The claim of one run on its workdir: a lock, a config that fits, and a check that the folder is still the same."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
from ml_collections import FrozenConfigDict

from mpdit_jax.checkpoint.load import CONFIG, load_config
from mpdit_jax.checkpoint.manager import DAMAGED, SAVED
from mpdit_jax.checkpoint.reader import CHECKPOINTS, list_steps, numbered_folders
from mpdit_jax.config.base import differences, to_json
from mpdit_jax.data.info import FACTS, FACTS_FILE
from mpdit_jax.distributed.collectives import first_sentence, run_on_process_0
from mpdit_jax.errors import CheckpointError, MPDiTError, ProcessError
from mpdit_jax.io.files import (
    Lock,
    atomic_write,
    check_place,
    check_writable,
    is_json_with,
    parse_json,
    remove_stale_tmp,
    take_lock,
)

_LOCK = ".lock"
_METRICS, _SAMPLES, _TENSORBOARD, _EVALUATION = "metrics.jsonl", "samples", "tensorboard", "evaluation"
_OF_A_RUN = ("model", "optimizer", "data")  # fields of every version's config
_FOLDERS = (CHECKPOINTS, DAMAGED, _SAMPLES, _TENSORBOARD)


class Claim:
    """What a run holds of its workdir.

    Attributes:
        note: a sentence about what was found there and put aside; empty if nothing was, and on other processes than
            the first.
    """

    def __init__(self, lock: Lock | None, note: str = "") -> None:
        """The lock is None on every process but the first."""
        self._lock, self.note = lock, note

    def check(self) -> None:
        """Raise CheckpointError, on every process, if the workdir was deleted or replaced since; all must ask."""
        run_on_process_0(self._check)

    def _check(self) -> None:
        if self._lock is not None:
            self._lock.check("run")


@contextmanager
def lock_workdir(workdir: Path, config: FrozenConfigDict) -> Iterator[Claim]:
    """Hold the workdir for one run: store `config` there, or check that it continues what is stored.

    Raises:
        CheckpointError: another run is writing here (it is named), the workdir holds a run of another config (the
            differences are shown), or checkpoints without a config.
        InputError: the workdir cannot be written, or a file is where a folder is to go.
    """
    lock, note = run_on_process_0(partial(_claim, workdir, config)) or (None, "")
    try:
        _check_shared(workdir)
        yield Claim(lock, note)
    finally:
        if lock is not None:
            lock.close()  # the system lets go of it as well when the process ends, however it ends


def _check_shared(workdir: Path) -> None:
    """Raise ProcessError, on every process, unless all see the lock that the first one holds.

    A folder of another machine that has the same name would get that machine's part of every checkpoint.
    """
    if jax.process_count() == 1:
        return
    try:
        seen = (workdir / _LOCK).read_text().strip()
    except OSError as error:
        seen = error.strerror or "cannot be read"
    held = first_sentence(seen if jax.process_index() == 0 else "", "the first holds the lock")
    other = f"process {jax.process_index()} has another folder under --workdir={workdir} than process 0"
    if problem := first_sentence("" if seen == held else other, "all see the lock"):
        raise ProcessError(f"{problem}: give one on a file system that all machines share.")


def _claim(workdir: Path, config: FrozenConfigDict) -> tuple[Lock, str]:
    check_writable(workdir / CONFIG)
    for name in (*_FOLDERS, _METRICS):
        check_place(workdir / name, folder=name in _FOLDERS)
    if os.path.islink(workdir / CHECKPOINTS) and not os.path.exists(workdir / CHECKPOINTS):
        raise CheckpointError(
            f"{workdir / CHECKPOINTS} is a link to {os.readlink(workdir / CHECKPOINTS)}, which is not there: mount it, "
            "or remove the link to begin again."
        )
    if os.path.isdir(workdir / CHECKPOINTS):
        check_writable(workdir / CHECKPOINTS / "_")
    lock = take_lock(workdir / _LOCK)
    if isinstance(lock, str):
        raise CheckpointError(
            f"another training is writing to {workdir} ({lock}): wait for it to end, or use another --workdir."
        )
    try:
        for name in (CONFIG, _METRICS, FACTS_FILE):
            remove_stale_tmp(workdir, name)
        remove_stale_tmp(workdir / _SAMPLES)
        return lock, _claim_config(workdir, config)
    except BaseException:
        lock.close()
        raise


def _claim_config(workdir: Path, config: FrozenConfigDict) -> str:
    note = ""
    if not numbered_folders(workdir):  # there is nothing to continue that another config could contradict
        note = _keep_other_record(workdir, config)
    elif (workdir / CONFIG).exists():
        changed = differences(load_config(workdir), config)
        if changed:
            lines = [f"  config.{path}: {old!r} in the run, {new!r} now" for path, (old, new) in changed.items()]
            raise CheckpointError(
                f"{workdir} holds a run of another config:\n"
                + "\n".join(lines)
                + "\nUse another --workdir for a new run, or leave these fields as they were to continue this one."
            )
    else:
        raise CheckpointError(f"{workdir} has checkpoints but no {CONFIG}; restore that file or use another workdir.")
    if max(list_steps(workdir), default=0) >= config.steps:
        return note  # the run is done already: what is stored says how far it went
    with atomic_write(workdir / CONFIG) as file:
        file.write(to_json(config).encode())
    return note


def _keep_other_record(workdir: Path, config: FrozenConfigDict) -> str:
    """Rename what a run without checkpoints has left, rather than write over it."""
    metrics, whose = workdir / _METRICS, "another run"
    if not (metrics.exists() and metrics.stat().st_size):
        for name, fields in ((CONFIG, _OF_A_RUN), (FACTS_FILE, FACTS)):
            if (workdir / name).exists() and not is_json_with(workdir / name, fields):
                raise CheckpointError(
                    f"{workdir / name} is not of a run of this project, and would be overwritten: use another "
                    "--workdir."
                )
        return ""
    try:
        if (workdir / CONFIG).exists() and not differences(stored := load_config(workdir), config):
            if not has_saved(workdir, stored.checkpoint.every):
                return ""  # the same run, killed before its first checkpoint: it writes the same lines
            whose = "this run"
    except MPDiTError:
        pass  # not a config of this version
    # The metrics last: as long as they are there, what a kill cuts short here is made up for by the next start.
    names = (CONFIG, FACTS_FILE, _SAMPLES, _TENSORBOARD, _EVALUATION, _METRICS)
    record = [workdir / name for name in names if (workdir / name).exists()]
    count = 1
    while any(_numbered(path, count).exists() for path in record):
        count += 1
    kept = [path.rename(_numbered(path, count)) for path in record]
    (workdir / SAVED).unlink(missing_ok=True)
    return f"{workdir} holds no checkpoint, but the record of {whose}, now in {', '.join(map(str, kept))}"


def has_saved(workdir: Path, every: int) -> bool:
    """Whether a run that saves `every` so many steps has had a checkpoint, whatever became of it.

    It notes that down; those of older versions did not, and their second checkpoint waited for the first.
    """
    return (workdir / SAVED).exists() or _last_step(workdir / _METRICS) > 2 * every


def _last_step(metrics: Path) -> int:
    """The highest step of a run's log, 0 if there is none; lines that cannot be read do not count."""
    if not metrics.is_file():
        return 0
    steps = [0]
    for line in metrics.read_bytes().splitlines():
        try:
            steps.append(int(parse_json(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return max(steps)


def _numbered(path: Path, count: int) -> Path:
    return path.with_suffix(f".{count}{path.suffix}")
