"""Velocity fields, which solvers integrate.

Before its loop, a solver calls `prepare` once for all times at which it will evaluate the field. In the loop it passes
one entry of the result to each evaluation. For an MPDiT this moves the time embedding and the modulation out of the
loop. Fields are pytrees of their arrays.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from mpdit_jax.errors import InputError
from mpdit_jax.flow.protocols import ClassConditional, Factored, FlowMap, GuidedMap

Prepared: TypeAlias = Any
"""One prepared time: a pytree whose leaves have a leading axis of 1 (a time for the whole batch) or B (one each)."""


class Field(Protocol):
    """A velocity field of a batch."""

    def prepare(self, times: jax.Array) -> Prepared:
        """Prepare the times (n, 1) or (n, B): a pytree with leading axes (n, 1) or (n, B)."""

    def __call__(self, z: jax.Array, prepared: Prepared) -> jax.Array:
        """Return velocities (B, H, W, C) at latents z (B, H, W, C) and one entry of `prepare`'s result."""

    def jump(self, z: jax.Array, start: Prepared, end: Prepared) -> jax.Array:
        """Return the average velocities (B, H, W, C) of jumps from latents z at time `start` to time `end`.

        Raises:
            InputError: the model cannot be a flow map.
        """
        raise InputError(f"{type(self).__name__} has no average velocity: solver='flow_map' needs an MPDiT.")

    def segments(self, start: float, end: float) -> "Sequence[Segment]":
        """Split the falling times [start, end] into segments, on each of which a field is smooth."""
        return [Segment(self, start, end)]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A field and the interval of falling times on which it applies."""

    field: Field
    start: float
    end: float


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainField(Field):
    """The field of a model that has the call signature alone."""

    model: ClassConditional
    labels: jax.Array  # (B,)

    def prepare(self, times: jax.Array) -> Prepared:
        """Return the times."""
        return times

    def __call__(self, z: jax.Array, prepared: Prepared) -> jax.Array:
        """Evaluate the model at a time (1,) or (B,)."""
        return _checked(self.model(z, jnp.broadcast_to(prepared, self.labels.shape), self.labels), z)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredField(Field):
    """The field of a model with separate parts: the class is embedded once, the modulation computed for all times."""

    model: Factored
    class_embedding: Any  # a pytree of (B, ...)
    scale: jax.Array | None = None  # () or (B,), of a model that takes the guidance scale as an input

    def prepare(self, times: jax.Array) -> Prepared:
        """Compute the modulation of every time."""
        if self.scale is None:
            modulation = self.model.modulation(times.reshape(-1))
        else:
            times, scales = jnp.broadcast_arrays(times, self.scale.reshape(1, -1))  # (n, 1) or (n, B)
            modulation = cast(GuidedMap, self.model).modulation(times.reshape(-1), None, scales.reshape(-1))
        return jax.tree.map(lambda leaf: leaf.reshape(*times.shape, *leaf.shape[1:]), modulation)

    def __call__(self, z: jax.Array, prepared: Prepared) -> jax.Array:
        """Evaluate the model's transformer."""
        return _checked(self.model.velocity(z, prepared, self.class_embedding), z)

    def jump(self, z: jax.Array, start: Prepared, end: Prepared) -> jax.Array:
        """Evaluate the model's transformer as a flow map."""
        if not isinstance(self.model, FlowMap):
            raise InputError(f"{type(self.model).__name__} cannot be a flow map: use another solver, such as 'euler'.")
        return self(z, self.model.jump_modulation(start, end))


def model_field(model: ClassConditional, labels: jax.Array, scale: jax.Array | None = None) -> Field:
    """Build the field of the model's velocity for `labels` (B,), from one pass.

    `scale`, () or (B,), is the guidance scale of a model that takes it as an input (`takes_scale`).
    """
    if isinstance(model, Factored):
        return FactoredField(model, model.class_embedding(labels), scale)
    return PlainField(model, labels)


def takes_scale(model: object) -> bool:
    """Return whether the model takes the guidance scale as an input."""
    return isinstance(model, GuidedMap) and model.guidance_max > 1


def _checked(velocity: jax.Array, z: jax.Array) -> jax.Array:
    if velocity.shape != z.shape:
        raise InputError(
            f"the model returns {velocity.shape} for latents {z.shape}: expected a velocity of the same shape, "
            "channels last (for a model with a learned variance, keep the first half of its channels)."
        )
    return velocity.astype(jnp.float32)
