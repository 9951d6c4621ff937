"""Classifier-free guidance."""

import jax
import jax.numpy as jnp

from mpdit_jax.flow.protocols import ClassConditional
from mpdit_jax.flow.solvers import VelocityField


def conditional(model: ClassConditional, labels: jax.Array) -> VelocityField:
    """The model's velocity for `labels` (B,), one evaluation a call."""

    def field(z: jax.Array, t: jax.Array) -> jax.Array:
        return model(z, jnp.broadcast_to(t, labels.shape), labels)

    return field


def classifier_free(model: ClassConditional, labels: jax.Array, scale: jax.Array) -> VelocityField:
    """v = v_null + scale (v_class - v_null) on all channels; both passes share one batch of 2B."""
    both = jnp.concatenate([labels, jnp.full_like(labels, model.num_classes)])  # (2B,)

    def field(z: jax.Array, t: jax.Array) -> jax.Array:
        velocity = model(jnp.concatenate([z, z]), jnp.broadcast_to(t, both.shape), both)  # (2B, H, W, C)
        v_class, v_null = jnp.split(velocity, 2)
        return v_null + scale * (v_class - v_null)

    return field
