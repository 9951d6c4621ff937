"""Guidance: fields that push the model's velocity away from a worse one.

    v = v_worse + scale (v_class - v_worse)

The worse velocity is that of the null class (classifier-free guidance, Ho & Salimans 2022), of a negative label, or of
a second, weaker model (autoguidance, Karras et al. 2024).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from mpdit_jax.flow.fields import Field, Prepared, Segment, model_field
from mpdit_jax.flow.protocols import ClassConditional


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """Both velocities from one model: one batch of 2B, in which an example's two rows follow each other.

    So they stay on the device that has the example: one half after the other would send half of the batch to other
    devices and back, at every step.
    """

    both: Field  # of a label and of what to guide away from, in turn: (2B,)
    scale: jax.Array  # () or (B,)

    def prepare(self, times: jax.Array) -> Prepared:
        """Points of the model; those of one time for each example are doubled as the batch is."""
        points = self.both.prepare(times)
        return points if times.shape[1] == 1 else jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=1), points)

    def __call__(self, z: jax.Array, point: Prepared) -> jax.Array:
        """The guided velocity."""
        v = self.both(jnp.repeat(z, 2, axis=0), point)  # (2B, H, W, C)
        v = v.reshape(z.shape[0], 2, *z.shape[1:])  # (B, 2, H, W, C)
        return _push(v[:, 0], v[:, 1], self.scale)

    def segments(self, start: float, end: float) -> Sequence[Segment]:
        """One."""
        return [Segment(self, start, end)]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class AutoGuidance:
    """The worse velocity from a second model."""

    model: Field
    guide: Field
    scale: jax.Array  # () or (B,)

    def prepare(self, times: jax.Array) -> Prepared:
        """Points of both models."""
        return self.model.prepare(times), self.guide.prepare(times)

    def __call__(self, z: jax.Array, point: Prepared) -> jax.Array:
        """The guided velocity."""
        return _push(self.model(z, point[0]), self.guide(z, point[1]), self.scale)

    def segments(self, start: float, end: float) -> Sequence[Segment]:
        """One."""
        return [Segment(self, start, end)]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LimitedInterval:
    """Guided for low <= t <= high, and one plain evaluation elsewhere (Kynkäänniemi et al. 2024)."""

    guided: Field
    plain: Field
    low: float = dataclasses.field(metadata={"static": True})
    high: float = dataclasses.field(metadata={"static": True})

    def prepare(self, times: jax.Array) -> Prepared:
        """Points of both fields, and which of them holds; times (n, 1)."""
        inside = (times[:, 0] >= jnp.float32(self.low)) & (times[:, 0] <= jnp.float32(self.high))  # (n,)
        return inside, self.guided.prepare(times), self.plain.prepare(times)

    def __call__(self, z: jax.Array, point: Prepared) -> jax.Array:
        """The field that holds; the other one does not run."""
        inside, guided, plain = point
        return jax.lax.cond(inside, lambda: self.guided(z, guided), lambda: self.plain(z, plain))

    def segments(self, start: float, end: float) -> Sequence[Segment]:
        """Up to three: before, inside, after."""
        high, low = min(self.high, start), max(self.low, end)
        pieces = [(self.plain, start, high), (self.guided, high, low), (self.plain, low, end)]
        return [Segment(field, first, last) for field, first, last in pieces if first > last]


def guided_field(
    model: ClassConditional,
    labels: jax.Array,
    negatives: jax.Array,
    scale: jax.Array,
    interval: tuple[float, float] = (0.0, 1.0),
    guide: ClassConditional | None = None,
) -> Field:
    """The guided velocity.

    Args:
        model: the model.
        labels: what to draw, (B,).
        negatives: labels of the worse velocity, (B,).
        scale: 1 is no guidance; () or (B,).
        interval: (low, high); outside it the second pass does not run.
        guide: the model of the worse velocity, where it is another one.
    """
    field: Field
    if guide is None:
        field = ClassifierFree(model_field(model, jnp.stack([labels, negatives], axis=1).reshape(-1)), scale)
    else:
        field = AutoGuidance(model_field(model, labels), model_field(guide, negatives), scale)
    if interval == (0.0, 1.0):
        return field
    return LimitedInterval(field, model_field(model, labels), *interval)


def _push(better: jax.Array, worse: jax.Array, scale: jax.Array) -> jax.Array:
    return worse + jnp.reshape(scale, (-1, 1, 1, 1)) * (better - worse)
