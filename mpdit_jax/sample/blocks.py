"""The folder of finished blocks that a large run keeps beside its output until it is done.

FOLDER/.lock             held by the run that draws; a second one is refused
FOLDER/settings.json     what decides every pixel; a run with other settings is refused
FOLDER/00000003.npz      block 3: `images` uint8 (n, H, W, C), `labels`, `indices` and `finite`, each (n,)
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpdit_jax.distributed.collectives import assert_equal_across_processes, barrier, run_on_process_0
from mpdit_jax.errors import InputError
from mpdit_jax.io.files import Lock, atomic_write, check_writable, parse_json, take_lock
from mpdit_jax.io.npz import read_npz

_LOCK, _SETTINGS = ".lock", "settings.json"
_PLACES = ("workdir", "png_folder")  # settings that another host may mount under another name


class Block(NamedTuple):
    """Finished images."""

    images: np.ndarray  # uint8 (n, H, W, C)
    labels: np.ndarray  # int64 (n,)
    indices: np.ndarray  # int64 (n,)
    finite: np.ndarray  # bool (n,); False where the model gave NaN or Inf


class BlockFolder:
    """Finished blocks on disk. Blocks are written whole or not at all, so whatever is there is finished.

    The folder belongs to one run until `remove` or `close`, or until its process ends.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Claim the folder for a run; every process must.

        Raises:
            ProcessError: the processes have other settings, as when they read other weights under one name.
            InputError: another run is drawing into it (which is named), it holds blocks of other settings (the
                differences are shown), blocks of which no settings are known, or cannot be written.
        """
        self.path, self._old = path, path.with_name(f"{path.name}.old")
        barrier("the settings are compared")
        assert_equal_across_processes({name: str(value) for name, value in settings.items() if name not in _PLACES})
        self._lock = run_on_process_0(partial(self._claim, settings))  # None on all processes but the first

    def _claim(self, settings: Mapping[str, Any]) -> Lock:
        check_writable(self.path / _SETTINGS)
        lock = take_lock(self.path / _LOCK)
        if isinstance(lock, str):
            raise InputError(
                f"another run is drawing into {self.path} ({lock}): wait for it to end, or choose another --out."
            )
        try:
            if not lock.is_in_place():
                raise InputError(f"another run has just finished with {self.path}: repeat the command.")
            self._claim_settings(settings)
        except BaseException:
            lock.close()
            raise
        return lock

    def _claim_settings(self, settings: Mapping[str, Any]) -> None:
        shutil.rmtree(self._old, ignore_errors=True)  # a kill may have cut off its removal
        path, stored = self.path, self.path / _SETTINGS
        text = json.dumps(dict(settings), indent=2, sort_keys=True) + "\n"
        if stored.is_file():
            before, now = _read_settings(stored), json.loads(text)
            changed = [
                f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
                for name in sorted({*before, *now})
                if before.get(name) != now.get(name)
            ]
            if changed:
                raise InputError(
                    f"{path} holds the unfinished images of a run with other settings ({'; '.join(changed)}): repeat "
                    "those settings to finish it, choose another --out, or delete that folder to give it up."
                )
        elif any(path.glob("*[0-9].npz")):
            raise InputError(
                f"{path} holds images and no {_SETTINGS} that says how they were drawn: delete that folder and repeat "
                "the command."
            )
        else:
            with atomic_write(stored) as file:
                file.write(text.encode())

    def __enter__(self) -> "BlockFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def has(self, number: int) -> bool:
        """Whether that block is finished."""
        return self._file(number).is_file()

    def write(self, number: int, block: Block) -> None:
        """Keep a finished block."""
        with atomic_write(self._file(number)) as file:
            np.savez(file, **block._asdict())

    def read(self, number: int) -> Block:
        """A finished block.

        Raises:
            InputError: it is missing or damaged.
        """
        try:
            return Block(*read_npz(self._file(number), Block._fields))
        except ValueError as error:
            raise InputError(
                f"{self._file(number)} cannot be read ({error}): delete that file and repeat the command."
            ) from error

    def read_all(self, count: int) -> Iterator[Block]:
        """Blocks 0 to count - 1, one in memory at a time."""
        return (self.read(number) for number in range(count))

    def remove(self) -> None:
        """Delete the folder, when its images are in their final place."""
        # Under another name, for a kill may leave some of the blocks, and no settings with them.
        shutil.rmtree(self._old, ignore_errors=True)
        self.path.rename(self._old)
        shutil.rmtree(self._old, ignore_errors=True)  # the next run may be clearing it away as well
        self.close()

    @staticmethod
    def is_begun(path: Path) -> bool:
        """Whether a run has begun there that can be continued."""
        return (path / _SETTINGS).is_file()

    def close(self) -> None:
        """Leave the folder, with what is in it, to another run."""
        if self._lock is not None:
            self._lock.close()

    def _file(self, number: int) -> Path:
        return self.path / f"{number:08d}.npz"


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete {path.parent} and repeat the command.") from error
