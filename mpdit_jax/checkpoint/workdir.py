"""The lock of a run on its workdir, and the check that its config continues what is stored there."""

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
from ml_collections import FrozenConfigDict

from mpdit_jax.checkpoint.load import CONFIG, load_config, run_around
from mpdit_jax.checkpoint.manager import DAMAGED, SAVED
from mpdit_jax.checkpoint.reader import CHECKPOINTS, list_steps, numbered_folders
from mpdit_jax.config.base import ADAPTABLE, differences, to_json
from mpdit_jax.data.info import INFO_FIELDS, INFO_FILE
from mpdit_jax.distributed.collectives import first_sentence, run_on_process_0
from mpdit_jax.errors import CheckpointError, MPDiTError, ProcessError
from mpdit_jax.io.atomic import atomic_write, check_writable
from mpdit_jax.io.json_files import is_json_with
from mpdit_jax.io.locked_folder import LOCK, Job, LockedFolder
from mpdit_jax.io.paths import check_place
from mpdit_jax.io.storage import check_storable

_METRICS, _SAMPLES, _TENSORBOARD, _EVALUATION = "metrics.jsonl", "samples", "tensorboard", "evaluation"
_CONFIG_FIELDS = ("model", "data")  # of every version's config, a VAE's included
_FOLDERS = (CHECKPOINTS, DAMAGED, _SAMPLES, _TENSORBOARD)
# Files whose half-written copies a training clears away; those of other commands are not among them.
_STALE = (CONFIG, _METRICS, INFO_FILE, "jax_flags.json", f"{_SAMPLES}/*", "vae/*", "reconstructions.png")
_TRAINING = Job("training", "writing to", "use another --workdir", CheckpointError, stale=_STALE)
Compare: TypeAlias = Callable[[Path, FrozenConfigDict], Mapping[str, tuple[Any, Any]]]
"""From a workdir and a config to the fields in which it contradicts the stored one, by path: (stored, new)."""


class LockedWorkdir:
    """A workdir that a run holds.

    Attributes:
        note: a sentence about an earlier record that was renamed; empty if there was none, and on other processes
            than 0.
    """

    def __init__(self, folder: LockedFolder | None, note: str = "") -> None:
        """`folder` is None on other processes than 0."""
        self._folder, self.note = folder, note

    def check(self) -> None:
        """Raise CheckpointError, on every process, if the workdir was deleted or replaced. Collective."""
        run_on_process_0(lambda: None if self._folder is None else self._folder.check())


def compare_configs(workdir: Path, config: FrozenConfigDict) -> Mapping[str, tuple[Any, Any]]:
    """Return the fields in which a run's config contradicts the one stored in its workdir, see `Compare`."""
    return differences(load_config(workdir), config)


@contextmanager
def lock_workdir(
    workdir: Path, config: FrozenConfigDict, compare: Compare = compare_configs
) -> Iterator[LockedWorkdir]:
    """Hold the workdir for one run: store `config` there, or check that it continues what is stored. Collective.

    Args:
        workdir: the folder.
        config: of the run, resolved; stored as config.json.
        compare: finds what contradicts the stored config; raises MPDiTError for one that cannot be read.

    Raises:
        CheckpointError: another run is writing here (it is named), the workdir holds a run of another config (the
            differences are shown), or checkpoints without a config.
        InputError: the workdir cannot be written or hold checkpoints, or a file is where a folder is to go.
        ProcessError: another process has another folder under this name.
    """
    folder, note = run_on_process_0(partial(_lock, workdir, config, compare)) or (None, "")
    try:
        _check_shared(workdir)
        yield LockedWorkdir(folder, note)
    finally:
        if folder is not None:
            folder.close()


def _check_shared(workdir: Path) -> None:
    """Raise ProcessError, on every process, unless all read the lock that process 0 wrote.

    On a folder that is not shared, each machine would get a part of every checkpoint.
    """
    if jax.process_count() == 1:
        return
    try:
        seen = (workdir / LOCK).read_text().strip()
    except OSError as error:
        seen = error.strerror or "cannot be read"
    held = first_sentence(seen if jax.process_index() == 0 else "", "the first holds the lock")
    other = f"process {jax.process_index()} has another folder under --workdir={workdir} than process 0"
    if problem := first_sentence("" if seen == held else other, "all see the lock"):
        raise ProcessError(f"{problem}: give one on a file system that all machines share.")


def _lock(workdir: Path, config: FrozenConfigDict, compare: Compare) -> tuple[LockedFolder, str]:
    check_storable(workdir)
    if run := run_around(workdir):
        raise CheckpointError(
            f"{workdir} lies among the checkpoints of the run {run}: give --workdir={run} to continue it, or another "
            "folder for a new run."
        )
    check_writable(workdir / CONFIG)
    for name in (*_FOLDERS, _METRICS):
        check_place(workdir / name, folder=name in _FOLDERS)
    checkpoints = workdir / CHECKPOINTS
    if checkpoints.is_symlink() and not checkpoints.exists():
        raise CheckpointError(
            f"{checkpoints} is a link to {os.readlink(checkpoints)}, which is not there: mount it, or remove the link "
            "to begin again."
        )
    if checkpoints.is_dir():
        check_writable(checkpoints / "_")
    folder = LockedFolder(workdir, _TRAINING)
    try:
        if numbered_folders(workdir):
            note = ""
            _check_config(workdir, config, compare)
        else:  # no checkpoint that another config could contradict
            note = _keep_other_record(workdir, config, compare)
        # The stored config of a finished run keeps saying how many steps it made.
        if max(list_steps(workdir), default=0) < config.steps:
            with atomic_write(workdir / CONFIG) as file:
                file.write(to_json(config).encode())
    except BaseException:
        folder.close()
        raise
    return folder, note


def _check_config(workdir: Path, config: FrozenConfigDict, compare: Compare) -> None:
    if not (workdir / CONFIG).exists():
        raise CheckpointError(f"{workdir} has checkpoints but no {CONFIG}; restore that file or use another workdir.")
    if changed := compare(workdir, config):
        lines = [f"  config.{path}: {old!r} in the run, {new!r} now" for path, (old, new) in changed.items()]
        adapted = {*ADAPTABLE, "null_class", "guidance_max"}  # the last two by label_dropout and by a new embedding
        fits = all(path.removeprefix("model.") in adapted for path in changed if path.startswith("model."))
        start = f" (with --config.init_from={shlex.quote(str(workdir))} it starts from this run's weights)"
        raise CheckpointError(
            f"{workdir} holds a run of another config:\n"
            + "\n".join(lines)
            + f"\nUse another --workdir for a new run{start if fits and compare is compare_configs else ''}, or leave "
            "these fields as they were to continue this one."
        )


def _keep_other_record(workdir: Path, config: FrozenConfigDict, compare: Compare) -> str:
    """Rename the record of a run without checkpoints, so that it is not overwritten; return a sentence about it."""
    metrics, whose = workdir / _METRICS, "another run"
    if not (metrics.exists() and metrics.stat().st_size):
        for name, fields in ((CONFIG, _CONFIG_FIELDS), (INFO_FILE, INFO_FIELDS)):
            if (workdir / name).exists() and not is_json_with(workdir / name, fields):
                raise CheckpointError(
                    f"{workdir / name} is not of a run of this project, and would be overwritten: use another "
                    "--workdir."
                )
        return ""
    try:
        if (workdir / CONFIG).exists() and not compare(workdir, config):
            if not (workdir / SAVED).exists():
                return ""  # the same run, killed before its first checkpoint, which writes the same lines again
            whose = "this run"
    except MPDiTError:
        pass  # not a config of this version
    # The metrics are renamed last: while they are there, the next start goes on after a kill in the middle.
    names = (CONFIG, INFO_FILE, _SAMPLES, _TENSORBOARD, _EVALUATION, _METRICS)
    record = [workdir / name for name in names if (workdir / name).exists()]
    count = 1
    while any(_numbered(path, count).exists() for path in record):
        count += 1
    kept = [path.rename(_numbered(path, count)) for path in record]
    (workdir / SAVED).unlink(missing_ok=True)
    return f"{workdir} holds no checkpoint, but the record of {whose}, now in {', '.join(map(str, kept))}"


def _numbered(path: Path, count: int) -> Path:
    return path.with_suffix(f".{count}{path.suffix}")
