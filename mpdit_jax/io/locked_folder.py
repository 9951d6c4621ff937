"""The one way to hold a folder for one job: a lock, the holder's name, and the settings that its files belong to."""

import dataclasses
import datetime
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from mpdit_jax.errors import CheckpointError, InputError, MPDiTError
from mpdit_jax.io.atomic import atomic_write, check_writable, remove_stale_tmp
from mpdit_jax.io.json_files import parse_json

LOCK = ".lock"
_OWNER_LIMIT = 200  # characters
_MOST_SHOWN = 5  # settings that differ


@dataclasses.dataclass(frozen=True)
class Job:
    """A kind of job that holds a folder, in the words of its errors."""

    name: str  # "evaluation", as in "another evaluation is using …"
    verb: str  # "using"
    remedy: str  # "choose another --out"
    error: type[MPDiTError] = InputError  # class of its errors
    temporary: bool = False  # the folder is deleted when the job is done
    stale: tuple[str, ...] = ("*",)  # patterns of the outputs whose stale temporaries are deleted, such as "samples/*"
    settings: str = ""  # name of the file of settings
    holds: str = ""  # what the settings decide, such as "latents"
    outputs: str = ""  # pattern of output files, which are refused without the file of settings


class LockedFolder:
    """A folder that this process holds, by a lock on the open file FOLDER/.lock, until `close` or until it ends.

    A file that a killed process left behind locks nothing.
    """

    def __init__(self, path: Path, job: Job, settings: Mapping[str, Any] | None = None) -> None:
        """Make the folder, lock it, delete stale temporaries, and store `settings` or compare them with those stored.

        Raises:
            job.error: another process holds the folder (it is named), or it holds files of other settings (the
                differences are shown).
            InputError: the folder cannot be written, or its file system has no locks.
        """
        self.path, self._job = path, job
        check_writable(path / LOCK)
        self._file = self._lock()
        try:
            if not self._is_in_place():
                raise job.error(f"another {job.name} has just finished with {path}: repeat the command.")
            if job.temporary:
                shutil.rmtree(self._removed, ignore_errors=True)  # a killed `remove` may have left it
            for pattern in job.stale:
                remove_stale_tmp((path / pattern).parent, (path / pattern).name)
            if settings is not None:
                self._match(settings)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "LockedFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder; delete a temporary one that holds nothing."""
        if self._job.temporary and self._is_in_place() and os.listdir(self.path) == [LOCK]:
            self.remove()
        self._file.close()

    def remove(self) -> None:
        """Delete the folder with all that is in it."""
        # Under another name: a kill may leave some of its files, and no settings with them.
        shutil.rmtree(self._removed, ignore_errors=True)
        self.path.rename(self._removed)
        shutil.rmtree(self._removed, ignore_errors=True)  # the next holder may be deleting it as well

    def check(self) -> None:
        """Raise CheckpointError if the folder was deleted or replaced since it was locked."""
        if not self._is_in_place():
            raise CheckpointError(
                f"{self.path} was deleted, moved or replaced while the {self._job.name} was writing to it: nothing "
                "more is written there; repeat the command to begin again, or give the --workdir it was moved to."
            )

    def _is_in_place(self) -> bool:
        try:
            there, held = os.stat(self.path / LOCK), os.fstat(self._file.fileno())
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)

    @property
    def _removed(self) -> Path:
        return self.path.with_name(f"{self.path.name}.old")

    def _lock(self) -> IO[str]:
        file = (self.path / LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise InputError(
                        f"cannot lock {self.path / LOCK} ({error.strerror}): two runs could not be told apart there; "
                        "mount the file system with locks, or choose another place."
                    ) from error
                file.seek(0)
                holder = file.read(_OWNER_LIMIT).strip() or "a process that does not say which"
            job = self._job
            raise job.error(
                f"another {job.name} is {job.verb} {self.path} ({holder}): wait for it to end, or {job.remedy}."
            ) from error
        file.truncate(0)
        now = datetime.datetime.now(datetime.UTC)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S} UTC\n")
        file.flush()
        os.fsync(file.fileno())  # on a shared file system other machines look for it
        return file

    def _match(self, settings: Mapping[str, Any]) -> None:
        job, path = self._job, self.path / self._job.settings
        give_up = "delete that folder and repeat the command" if job.temporary else job.remedy
        text = json.dumps(dict(settings), indent=1) + "\n"
        if not path.is_file():
            if any(self.path.glob(job.outputs)):
                raise job.error(
                    f"{self.path} holds {job.holds} and no {job.settings} that says how they were made: {give_up}."
                )
            with atomic_write(path) as file:
                file.write(text.encode())
            return
        try:
            before, now = flat(dict(parse_json(path.read_text()))), flat(json.loads(text))
        except (OSError, ValueError, TypeError) as error:
            raise job.error(f"{path} is damaged ({error}): {give_up}.") from error
        changed = [
            f"{name}: {before.get(name)} there, {now.get(name)} now"
            for name in now | before
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise job.error(
                f"{self.path} holds {job.holds} of other settings ({'; '.join(changed[:_MOST_SHOWN])}): repeat those "
                f"settings to continue, or {give_up}."
            )


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten lists to one entry a value, so that an error names only the values that differ."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= {f"{name}[{i}]": one for i, one in enumerate(value)} if isinstance(value, list) else {name: value}
    return found
