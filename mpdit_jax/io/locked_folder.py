"""A lock file that one process holds."""

import datetime
import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from mpdit_jax.errors import CheckpointError, InputError

_OWNER_LIMIT = 200  # characters


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
