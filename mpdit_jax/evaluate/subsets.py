"""Subsets of an image set."""

import dataclasses
from typing import Any

import numpy as np

from mpdit_jax.data.image_sets import ArrayImages, ImageSet, count_labels
from mpdit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SomeImages:
    """Chosen rows of an image set."""

    images: ImageSet
    rows: np.ndarray  # int (n,), rising
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each image."""
        return self.images.shape

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Read the images of these numbers."""
        return self.images.read(self.rows[indices])


def random_subset(images: ImageSet, count: int | None) -> ImageSet:
    """Return `count` images of a set, all for None; raises InputError if there are fewer.

    One image is chosen at random from each of `count` equal parts, the same each time: sets are often ordered by class,
    and every tenth image may be of one class.
    """
    if count is None or count == len(images):
        return images
    if not 1 <= count <= len(images):
        raise InputError(f"--num_samples={count}: expected 1 to {len(images)}, the number of images in the set.")
    bounds = np.arange(count + 1) * len(images) // count
    rows = np.random.default_rng(0).integers(bounds[:-1], bounds[1:])
    about = {**images.about, "count": count, "of": len(images), "chosen": f"one at random of each of {count} parts"}
    if isinstance(images, ArrayImages) and images.labels is not None:
        about["labels"] = count_labels(images.labels[rows])
    return SomeImages(images, rows, about)
