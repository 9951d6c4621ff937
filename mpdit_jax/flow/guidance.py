"""Guided velocity fields: v = v_worse + scale (v_class - v_worse).

The worse velocity is that of the null class (classifier-free guidance, Ho & Salimans 2022), of a negative label, or of
a second, weaker model (autoguidance, Karras et al. 2024).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from mpdit_jax.flow.fields import Field, Prepared, Segment, model_field, takes_scale
from mpdit_jax.flow.protocols import ClassConditional


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFree(Field):
    """Guidance with both velocities from one model, evaluated as one batch of 2B.

    The two rows of an example are adjacent and so stay on the example's device. With the rows in two halves, half of
    the batch would move between devices at every step.
    """

    both: Field  # labels (2B,): for each example its label, then the label to guide away from
    scale: jax.Array  # () or (B,)

    def prepare(self, times: jax.Array) -> Prepared:
        """Prepare the times for the batch of 2B."""
        prepared = self.both.prepare(times)
        return prepared if times.shape[1] == 1 else jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=1), prepared)

    def __call__(self, z: jax.Array, prepared: Prepared) -> jax.Array:
        """Return the guided velocity."""
        return self._combine(z, self.both(jnp.repeat(z, 2, axis=0), prepared))

    def jump(self, z: jax.Array, start: Prepared, end: Prepared) -> jax.Array:
        """Return the guided average velocity."""
        return self._combine(z, self.both.jump(jnp.repeat(z, 2, axis=0), start, end))

    def _combine(self, z: jax.Array, v: jax.Array) -> jax.Array:
        v = v.reshape(z.shape[0], 2, *z.shape[1:])  # (B, 2, H, W, C)
        return _extrapolate(v[:, 0], v[:, 1], self.scale)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class AutoGuidance(Field):
    """Guidance with the worse velocity from a second model."""

    model: Field
    guide: Field
    scale: jax.Array  # () or (B,)

    def prepare(self, times: jax.Array) -> Prepared:
        """Prepare the times for both models."""
        return self.model.prepare(times), self.guide.prepare(times)

    def __call__(self, z: jax.Array, prepared: Prepared) -> jax.Array:
        """Return the guided velocity."""
        return _extrapolate(self.model(z, prepared[0]), self.guide(z, prepared[1]), self.scale)

    def jump(self, z: jax.Array, start: Prepared, end: Prepared) -> jax.Array:
        """Return the guided average velocity."""
        better, worse = self.model.jump(z, start[0], end[0]), self.guide.jump(z, start[1], end[1])
        return _extrapolate(better, worse, self.scale)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LimitedInterval(Field):
    """The guided field for low <= t <= high, and the plain field elsewhere (Kynkäänniemi et al. 2024)."""

    guided: Field
    plain: Field
    low: float = dataclasses.field(metadata={"static": True})
    high: float = dataclasses.field(metadata={"static": True})

    def prepare(self, times: jax.Array) -> Prepared:
        """Prepare times (n, 1) for both fields, and record which field applies."""
        inside = (times[:, 0] >= jnp.float32(self.low)) & (times[:, 0] <= jnp.float32(self.high))  # (n,)
        return inside, self.guided.prepare(times), self.plain.prepare(times)

    def __call__(self, z: jax.Array, prepared: Prepared) -> jax.Array:
        """Evaluate the field that applies; the other one does not run."""
        inside, guided, plain = prepared
        return jax.lax.cond(inside, lambda: self.guided(z, guided), lambda: self.plain(z, plain))

    def jump(self, z: jax.Array, start: Prepared, end: Prepared) -> jax.Array:
        """Evaluate the field that applies where the jump starts."""
        inside, guided, plain = start
        _, guided_end, plain_end = end
        return jax.lax.cond(
            inside, lambda: self.guided.jump(z, guided, guided_end), lambda: self.plain.jump(z, plain, plain_end)
        )

    def segments(self, start: float, end: float) -> Sequence[Segment]:
        """Return up to three segments: before, inside and after the interval."""
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
    """Build the guided velocity field.

    Args:
        model: the model.
        labels: labels to draw, (B,).
        negatives: labels to guide away from, (B,).
        scale: guidance scale, () or (B,); 1 is no guidance.
        interval: times (low, high) at which to guide; elsewhere there is no second pass.
        guide: weaker model to guide away from; default `model`, or one pass if it takes the scale as an input.
    """
    field: Field
    if guide is None and takes_scale(model):
        field = model_field(model, labels, scale)
    elif guide is None:
        field = ClassifierFree(model_field(model, jnp.stack([labels, negatives], axis=1).reshape(-1)), scale)
    else:
        field = AutoGuidance(model_field(model, labels), model_field(guide, negatives), scale)
    if interval == (0.0, 1.0):
        return field
    return LimitedInterval(field, model_field(model, labels), *interval)


def _extrapolate(better: jax.Array, worse: jax.Array, scale: jax.Array) -> jax.Array:
    return worse + jnp.reshape(scale, (-1, 1, 1, 1)) * (better - worse)
