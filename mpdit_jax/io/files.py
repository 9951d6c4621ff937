"""Writing files so that a reader never meets half of one."""

import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mpdit_jax.errors import CheckpointError, InputError

# What a file system refuses: no space, no quota, too large, not permitted, read-only, broken, gone.
REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ENOENT,
    errno.ESTALE,
    errno.ENAMETOOLONG,
)
_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
_OWNER_LIMIT = 200  # characters


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place when the block ends, and vanishes when the block fails.

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
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A place of the same name, in a folder beside `path`: what is there when the block ends takes `path`'s place.

    Nothing of it stays when the block fails. An empty folder at `path` is replaced, one with anything in it is not.
    """
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield folder / path.name
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale_tmp(folder: Path, name: str = "*") -> None:
    """Delete what a killed `atomic_write` or `atomic_dir` has left in a folder, of outputs whose name fits a pattern.

    Only for those who hold the folder's lock, or to whom alone the files of that name belong.
    """
    for path in folder.glob(f".{name}.????????.tmp"):
        if _LEFTOVER.fullmatch(path.name) and path.is_dir():  # of `atomic_dir`
            shutil.rmtree(path, ignore_errors=True)
        elif _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Make the folder of `path`, and raise InputError if a file could not be written there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; give the name of a file.")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place.") from error


def check_place(path: Path, *, folder: bool) -> None:
    """Raise InputError if something of the other kind is where a folder, or a file, is to go."""
    if path.exists() and path.is_dir() != folder:
        wanted, found = ("folder", "file") if folder else ("file", "folder")
        raise InputError(f"cannot write {path}: a {wanted} is to go there and a {found} is in its place; move it away.")


def expand(path: str | Path) -> Path:
    """The path, with a `~` at its beginning made the home folder.

    Raises:
        InputError: of a user that this machine does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: this machine knows no home folder of that user; give the whole path.") from error


class Lock:
    """A file that this process alone holds. The system lets go of it when the process ends, however it ends.

    There is therefore no such thing as a stale lock: a file that is there and that nobody holds is taken over. What is
    written in it says who holds it, for those who have to wait.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        """Of an open and locked file."""
        self._path, self._file = path, file

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        self._file.close()

    def check(self, writer: str) -> None:
        """Raise CheckpointError if the folder that is locked was deleted or replaced since `writer` began."""
        if not self.is_in_place():
            raise CheckpointError(
                f"{self._path.parent} was deleted, moved or replaced while the {writer} was writing to it: nothing "
                "more is written there; repeat the command to begin again, or give the --workdir it was moved to."
            )

    def is_in_place(self) -> bool:
        """Whether the file under its name is still the one that is held."""
        try:
            there, held = os.stat(self._path), os.fstat(self._file.fileno())
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)


def take_lock(path: Path) -> Lock | str:
    """The lock file `path`, or who holds it, such as "process 4242 on node7 since 2026-11-25 13:20:05 UTC".

    Raises:
        InputError: the file system knows no locks.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(
                    f"cannot lock {path} ({error.strerror}): two runs could not be told apart there; mount the file "
                    "system with locks, or choose another place."
                ) from error
            file.seek(0)
            return file.read(_OWNER_LIMIT).strip() or "a process that does not say which"
    file.truncate(0)
    now = datetime.datetime.now(datetime.UTC)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S} UTC\n")
    file.flush()
    os.fsync(file.fileno())  # on a shared file system other machines look for it
    return Lock(path, file)


def reason(error: Exception) -> str:
    """What the system said, where a library wraps it in its own words; else the first line of what the library says."""
    text = str(error)
    for code in REFUSALS:
        if os.strerror(code) in text:
            return os.strerror(code)
    return text.splitlines()[0][:200] if text else type(error).__name__


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that is not ours alone to write.

    Raises:
        ValueError: it is none, or lists within lists too deep for the parser.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("too many levels of brackets") from error


def is_json_with(path: Path, names: Collection[str]) -> bool:
    """Whether a file is a JSON object that has these fields, by which one of ours is told from somebody else's."""
    try:
        return set(parse_json(path.read_text())) >= set(names)
    except (OSError, ValueError, TypeError):
        return False


def digest_of(content: Any) -> str:
    """The first digits of a SHA-256 over plain values, which names the files that belong to them."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
