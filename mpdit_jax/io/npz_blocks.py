"""Numbered `.npz` files in a folder: the finished parts of a long job, from which the same command continues."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.npz import read_npz


class NpzBlocks:
    """Blocks of arrays on disk, FOLDER/00000003.npz is block 3. A block is written whole or not at all."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Name the folder and the arrays of every block; the first `write` makes the folder."""
        self.folder, self._names = folder, tuple(names)

    def has(self, number: int) -> bool:
        """Return whether that block is finished."""
        return self._file(number).is_file()

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Store a finished block."""
        with atomic_write(self._file(number)) as file:
            np.savez(file, **{name: arrays[name] for name in self._names})  # type: ignore[arg-type]  # allow_pickle

    def read(self, number: int) -> dict[str, np.ndarray]:
        """Return a finished block. Raise InputError if it is missing or damaged."""
        path = self._file(number)
        try:
            return dict(zip(self._names, read_npz(path, self._names), strict=True))
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}): delete that file and repeat the command.") from error

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.npz"
