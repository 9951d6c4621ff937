"""Where one evaluation keeps what is unfinished: a folder beside its output that is its own while it runs."""

import glob
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mpdit_jax.distributed.collectives import run_on_process_0
from mpdit_jax.errors import InputError
from mpdit_jax.io.files import Lock, check_writable, remove_stale_tmp, take_lock

_LOCK = ".lock"


@contextmanager
def claimed(scratch: Path, written: Sequence[Path]) -> Iterator[None]:
    """Hold the folder for one command, and clear away what a killed one has left; all processes must ask.

    What is unfinished stays when the block ends, unless `clear` was called; an empty folder does not.

    Args:
        scratch: the folder, which is made.
        written: the files that the command writes in the end.

    Raises:
        InputError: another command holds it, or it cannot be written.
    """
    lock = run_on_process_0(partial(_take, scratch, written))
    try:
        yield
    finally:
        if lock is not None:
            if lock.is_in_place() and [path.name for path in scratch.iterdir()] == [_LOCK]:
                clear(scratch)
            lock.close()


def clear(scratch: Path) -> None:
    """Delete what is no longer needed once everything is written; by the process that holds it."""
    shutil.rmtree(_cleared(scratch), ignore_errors=True)
    if scratch.is_dir():
        # Under another name, for a kill may leave some of the samples, and no settings with them.
        shutil.rmtree(scratch.rename(_cleared(scratch)), ignore_errors=True)


def _take(scratch: Path, written: Sequence[Path]) -> Lock:
    check_writable(scratch / _LOCK)
    lock = take_lock(scratch / _LOCK)
    if isinstance(lock, str):
        raise InputError(
            f"another evaluation is using {scratch} ({lock}): wait for it to end, or choose another --out."
        )
    if not lock.is_in_place():
        lock.close()
        raise InputError(f"another evaluation has just finished with {scratch}: repeat the command.")
    shutil.rmtree(_cleared(scratch), ignore_errors=True)
    for path in written:
        remove_stale_tmp(path.parent, glob.escape(path.name))
    return lock


def _cleared(scratch: Path) -> Path:
    return scratch.with_name(f"{scratch.name}.old")
