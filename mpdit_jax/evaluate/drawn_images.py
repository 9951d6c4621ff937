"""Samples of a model as an image set, drawn when they are read."""

import dataclasses
from typing import Any

import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.sample.drawing import Drawing


@dataclasses.dataclass(frozen=True)
class DrawnImages:
    """Image set of a drawing (see `ImageSet`). An image with NaN or Inf is an error, or left out with `leave_out`."""

    drawing: Drawing
    shape: tuple[int, int, int]  # (H, W, C) of a decoded image
    about: dict[str, Any]
    leave_out: bool = False

    def __len__(self) -> int:
        return len(self.drawing)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Draw the images of these numbers (n,), at most a batch: uint8 (n or fewer, H, W, C)."""
        block = self.drawing.draw(indices)
        if not self.leave_out and not block.finite.all():
            bad = block.indices[~block.finite][0]
            raise InputError(
                f"image {bad} that the model drew holds NaN or Inf: the model has diverged, or --steps is low."
            )
        return block.images[block.finite]
