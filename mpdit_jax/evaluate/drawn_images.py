"""Samples of a model as a set of images, drawn when they are read."""

import dataclasses
from typing import Any

import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.sample.drawing import Drawing


@dataclasses.dataclass(frozen=True)
class DrawnImages:
    """See `ImageSet`. With `leave_out`, images that hold NaN or Inf are left out; else they are an error."""

    drawing: Drawing
    shape: tuple[int, int, int]  # (H, W, C) of a decoded image
    about: dict[str, Any]
    leave_out: bool = False

    def __len__(self) -> int:
        return len(self.drawing)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Draw the images of those numbers (n,), at most a batch of them: uint8 (n or fewer, H, W, C).

        Raises:
            InputError: an image holds NaN or Inf.
        """
        block = self.drawing.draw(indices)
        if not self.leave_out and not block.finite.all():
            bad = block.indices[~block.finite][0]
            raise InputError(f"image {bad} that the model drew holds NaN or Inf: it has diverged, or --steps is low.")
        return block.images[block.finite]
