"""Atomic writes: a reader never meets half a file or folder."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mpdit_jax.errors import InputError
from mpdit_jax.io.paths import check_local

_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary binary file that replaces `path` when the block ends, and is deleted when the block fails.

    Raises:
        InputError: the folder cannot be made or written.
    """
    path = Path(path)
    check_writable(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder; what the block puts there is moved to `path` at the end.

    It is deleted when the block fails. An empty folder at `path` is replaced; one that holds anything raises OSError.
    """
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield folder / path.name
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale_tmp(folder: Path, name: str = "*") -> None:
    """Delete the temporaries that a killed `atomic_write` or `atomic_dir` left in a folder.

    Call it only while holding the folder's lock, or where nobody else writes outputs of that name.

    Args:
        folder: the folder.
        name: glob pattern of the outputs' names.
    """
    for path in folder.glob(f".{name}.????????.tmp"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Make the folder of `path`, and raise InputError if a file could not be written there."""
    path = Path(path)
    check_local(str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; give the name of a file.")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place.") from error
