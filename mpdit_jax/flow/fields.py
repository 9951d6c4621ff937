"""Velocity fields: what a solver integrates. The work that time or class alone decides is done apart, once.

A solver first asks a field to `prepare` every time at which it will evaluate it, outside its loop, and then passes one
entry of what it got with each evaluation. For an MPDiT that takes the time embedding and the modulation out of the
loop. Fields are pytrees of their arrays.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from mpdit_jax.errors import InputError
from mpdit_jax.flow.protocols import ClassConditional, Factored

Prepared: TypeAlias = Any
"""One prepared time: a pytree whose leaves have a leading axis of 1 (a time for the whole batch) or B (one each)."""


class Field(Protocol):
    """A velocity field of a batch."""

    def prepare(self, times: jax.Array) -> Prepared:
        """Points for times (n, 1) or (n, B): a pytree with leading axes (n, 1) or (n, B)."""

    def __call__(self, z: jax.Array, point: Prepared) -> jax.Array:
        """Velocities (B, H, W, C) at latents z (B, H, W, C) and one entry of `prepare`."""

    def segments(self, start: float, end: float) -> "Sequence[Segment]":
        """Stretches of [start, end], falling times, on each of which a field is smooth."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A field and the stretch of falling times on which it holds."""

    field: Field
    start: float
    end: float


@register_dataclass
@dataclasses.dataclass(frozen=True)
class FunctionField:
    """The field of a plain function (z, t) with t of shape (1,) or (B,)."""

    function: Callable[[jax.Array, jax.Array], jax.Array] = dataclasses.field(metadata={"static": True})

    def prepare(self, times: jax.Array) -> Prepared:
        """The times themselves."""
        return times

    def __call__(self, z: jax.Array, point: Prepared) -> jax.Array:
        """function(z, t)."""
        return self.function(z, point)

    def segments(self, start: float, end: float) -> Sequence[Segment]:
        """One."""
        return [Segment(self, start, end)]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainField:
    """A model that has the call signature and nothing more."""

    model: ClassConditional
    labels: jax.Array  # (B,)

    def prepare(self, times: jax.Array) -> Prepared:
        """The times themselves."""
        return times

    def __call__(self, z: jax.Array, point: Prepared) -> jax.Array:
        """The model at time `point`, (1,) or (B,)."""
        return _checked(self.model(z, jnp.broadcast_to(point, self.labels.shape), self.labels), z)

    def segments(self, start: float, end: float) -> Sequence[Segment]:
        """One."""
        return [Segment(self, start, end)]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredField:
    """A model taken apart: what the class decides is made once, what the time decides for all times at once."""

    model: Factored
    class_embedding: Any  # a pytree of (B, ...)

    def prepare(self, times: jax.Array) -> Prepared:
        """The modulation of every time."""
        modulation = self.model.modulation(times.reshape(-1))
        return jax.tree.map(lambda leaf: leaf.reshape(*times.shape, *leaf.shape[1:]), modulation)

    def __call__(self, z: jax.Array, point: Prepared) -> jax.Array:
        """The model's trunk."""
        return _checked(self.model.velocity(z, point, self.class_embedding), z)

    def segments(self, start: float, end: float) -> Sequence[Segment]:
        """One."""
        return [Segment(self, start, end)]


def model_field(model: ClassConditional, labels: jax.Array) -> Field:
    """The model's velocity for `labels` (B,), one evaluation a call."""
    if isinstance(model, Factored):
        return FactoredField(model, model.class_embedding(labels))
    return PlainField(model, labels)


def _checked(velocity: jax.Array, z: jax.Array) -> jax.Array:
    if velocity.shape != z.shape:
        raise InputError(
            f"the model gives {velocity.shape} for latents {z.shape}: expected a velocity of the same shape, channels "
            "last (for a model with a learned variance, keep the first half of its channels)."
        )
    return velocity.astype(jnp.float32)
