"""What flow matching needs of a model: its call signature, the shape it works on, and its classes."""

from typing import Protocol

import jax


class Velocity(Protocol):
    """A function of latents (B, H, W, C), times (B,) and labels (B,) that gives velocities (B, H, W, C)."""

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array, /) -> jax.Array:
        """Velocity dz/dt at `x`, `t`, for class `y`."""


class ClassConditional(Velocity, Protocol):
    """A velocity that knows its latent shape and its classes."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""

    @property
    def num_classes(self) -> int:
        """Number of classes, and the label of the null class."""
