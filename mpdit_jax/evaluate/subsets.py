"""Some of the images of a set, spread over all of it."""

import dataclasses
from typing import Any

import numpy as np

from mpdit_jax.data.image_sets import ImageSet
from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.sets import ArrayImages, count_labels


@dataclasses.dataclass(frozen=True)
class SomeImages:
    """Rows of a set."""

    images: ImageSet
    rows: np.ndarray  # int (n,), rising
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each."""
        return self.images.shape

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Those images."""
        return self.images.read(self.rows[indices])


def limited(images: ImageSet, count: int | None) -> ImageSet:
    """`count` images, one from each of as many equal parts of a set; all for None. The same ones each time.

    Which one of its part is random: sets lie class by class, or go round the classes, and every tenth image of the
    latter may be of one class.

    Raises:
        InputError: there are not so many.
    """
    if count is None or count == len(images):
        return images
    if not 1 <= count <= len(images):
        raise InputError(f"--num_samples={count}: expected 1 to {len(images)}, the number of images there are.")
    bounds = np.arange(count + 1) * len(images) // count
    rows = np.random.default_rng(0).integers(bounds[:-1], bounds[1:])
    about = {**images.about, "count": count, "of": len(images), "chosen": f"one at random of each of {count} parts"}
    if isinstance(images, ArrayImages) and images.labels is not None:
        about["labels"] = count_labels(images.labels[rows])
    return SomeImages(images, rows, about)
