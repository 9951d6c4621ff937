"""Which steps count: one whose loss, gradient or update is not finite, or spikes, is left out and counted."""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

Guard: TypeAlias = dict[str, jax.Array]
"""`accepted` and `skipped_in_a_row` int32; `gradient_norm` float32, the running mean before its start is corrected."""

_DECAY = 0.99  # of the running mean of gradient norms
_WARM = 100  # accepted steps before a norm can be called a spike: early ones fall by orders of magnitude


def new_guard() -> Guard:
    """The guard before the first step."""
    return {
        "accepted": jnp.zeros((), jnp.int32),
        "gradient_norm": jnp.zeros((), jnp.float32),
        "skipped_in_a_row": jnp.zeros((), jnp.int32),
    }


def judge(guard: Guard, metrics: Mapping[str, jax.Array], spike_factor: float) -> jax.Array:
    """Whether a step with these metrics (loss and norms, scalars) is to count, a boolean scalar."""
    good = jnp.isfinite(jnp.stack([*metrics.values()])).all()
    if not spike_factor:
        return good
    mean = guard["gradient_norm"] / (1 - _DECAY ** jnp.maximum(guard["accepted"], 1).astype(jnp.float32))
    return good & ((guard["accepted"] < _WARM) | (metrics["gradient_norm"] <= spike_factor * mean))


def accept(guard: Guard, good: jax.Array, gradient_norm: jax.Array) -> Guard:
    """The guard after a step that did or did not count."""
    mean = _DECAY * guard["gradient_norm"] + (1 - _DECAY) * gradient_norm
    return {
        "accepted": guard["accepted"] + good,
        "gradient_norm": jnp.where(good, mean, guard["gradient_norm"]),
        "skipped_in_a_row": jnp.where(good, 0, guard["skipped_in_a_row"] + 1),
    }
