"""Features of many images: in blocks that outlive a crash, shared out over processes."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from mpdit_jax.distributed.collectives import barrier
from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.agreement import name_of_first
from mpdit_jax.evaluate.extractors import Extractor, Features
from mpdit_jax.evaluate.sets import ImageBlocks
from mpdit_jax.io.files import atomic_write, digest_of
from mpdit_jax.io.npz import read_npz
from mpdit_jax.runtime.progress import WorkBar

_BLOCK = 512  # images a file


class FeatureFolder:
    """Finished features on disk, in a folder named after everything that decides them. A block is written whole or not
    at all, so whatever is there is finished.
    """

    def __init__(self, root: Path, extractor: Extractor, images: ImageBlocks, outputs: Sequence[str]) -> None:
        """Nothing is made yet; every process must ask, for the first names the folder."""
        self.total, self.count = len(images), -(-len(images) // _BLOCK)  # images, blocks
        self._outputs = sorted(outputs)
        decides = [extractor.fingerprint, images.about, self._outputs, _BLOCK]
        self.path = root / name_of_first(digest_of(decides))

    def is_mine(self, number: int) -> bool:
        """Whether that block is this process's share: b is of process b modulo the number of processes."""
        return number % jax.process_count() == jax.process_index()

    def rows(self, number: int) -> np.ndarray:
        """The images (n,) of that block."""
        return np.arange(number * _BLOCK, min((number + 1) * _BLOCK, self.total))

    def has(self, number: int) -> bool:
        """Whether that block is finished."""
        return self._file(number).is_file()

    def write(self, number: int, features: Features) -> None:
        """Keep a finished block."""
        with atomic_write(self._file(number)) as file:
            np.savez(file, **features)  # type: ignore[arg-type]  # numpy's stub takes the names for allow_pickle

    def read(self, number: int) -> Features:
        """A finished block.

        Raises:
            InputError: it is missing or damaged.
        """
        try:
            return dict(zip(self._outputs, read_npz(self._file(number), self._outputs), strict=True))
        except ValueError as error:
            raise InputError(
                f"{self._file(number)} cannot be read ({error}): delete that file and repeat the command."
            ) from error

    def _file(self, number: int) -> Path:
        return self.path / f"{number:08d}.npz"


def extract(
    extractor: Extractor, images: ImageBlocks, outputs: Sequence[str], folder: FeatureFolder, verb: str = "looking at"
) -> None:
    """Look at all images and keep their features in a folder that all processes see, each process its share of blocks.

    Blocks that are there already are not computed again.

    Args:
        extractor: the network.
        images: what it looks at.
        outputs: which of the extractor's to keep.
        folder: where finished blocks go.
        verb: of the progress bar.

    Raises:
        InputError, DataError: images that cannot be looked at.
    """
    mine = [number for number in range(folder.count) if folder.is_mine(number)]
    todo = [number for number in mine if not folder.has(number)]
    size = {number: len(folder.rows(number)) for number in mine}
    done = sum(size[number] for number in mine) - sum(size[number] for number in todo)
    with WorkBar(verb, "images", sum(size.values()), done) as bar:
        if done and todo:
            bar.say(f"{done} of {sum(size.values())} images were looked at already, in {folder.path}")
        for number in todo:
            found: list[Features] = []
            rows = folder.rows(number)
            for start in range(0, len(rows), extractor.batch_size):
                part = rows[start : start + extractor.batch_size]
                seen = extractor(images.read(part), part)
                found.append({name: array for name, array in seen.items() if name in outputs})
                bar.advance(len(part))
            folder.write(number, {name: np.concatenate([part[name] for part in found]) for name in found[0]})
    barrier("every image has been looked at")
