"""Folder of finished blocks, kept beside the output until all images are drawn.

FOLDER/settings.json     settings that decide every pixel; a run with other settings is refused
FOLDER/00000003.npz      block 3: `images` uint8 (n, H, W, C), `labels`, `indices` and `finite`, each (n,)
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpdit_jax.distributed.collectives import assert_equal_across_processes, run_on_process_0
from mpdit_jax.io.locked_folder import Job, LockedFolder
from mpdit_jax.io.npz_blocks import NpzBlocks

_JOB = Job(
    "run", "drawing into", "choose another --out",
    temporary=True, settings="settings.json", holds="images", outputs="*[0-9].npz",
)  # fmt: skip
_PLACES = ("workdir", "png_folder")  # paths that may differ between hosts


class Block(NamedTuple):
    """Finished images."""

    images: np.ndarray  # uint8 (n, H, W, C)
    labels: np.ndarray  # int64 (n,)
    indices: np.ndarray  # int64 (n,)
    finite: np.ndarray  # bool (n,); False where the model gave NaN or Inf


class BlockFolder:
    """Finished blocks on disk, each written whole or not at all. One run locks the folder until `close`."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Lock the folder for a run of these settings; raises ProcessError if processes differ. Collective."""
        self._blocks = NpzBlocks(path, Block._fields)
        self.path = path
        assert_equal_across_processes({name: str(value) for name, value in settings.items() if name not in _PLACES})
        self._lock = run_on_process_0(partial(LockedFolder, path, _JOB, settings))  # None but on process 0

    def __enter__(self) -> "BlockFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def has(self, number: int) -> bool:
        """Return whether a block is finished."""
        return self._blocks.has(number)

    def write(self, number: int, block: Block) -> None:
        """Store a finished block."""
        self._blocks.write(number, block._asdict())

    def read(self, number: int) -> Block:
        """Read a finished block; raises InputError if it is missing or damaged."""
        return Block(**self._blocks.read(number))

    def read_all(self, count: int) -> Iterator[Block]:
        """Read blocks 0 to count - 1, one at a time."""
        return (self.read(number) for number in range(count))

    def remove(self) -> None:
        """Delete the folder once its images are in the outputs; on process 0."""
        if self._lock is not None:
            self._lock.remove()

    @staticmethod
    def is_begun(path: Path) -> bool:
        """Return whether the folder holds a run that can be continued."""
        return (path / _JOB.settings).is_file()

    def close(self) -> None:
        """Unlock the folder; finished blocks stay."""
        if self._lock is not None:
            self._lock.close()
