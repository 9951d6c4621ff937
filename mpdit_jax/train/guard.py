"""The guard decides which steps are applied: a step whose loss or gradient is not finite, or spikes, changes nothing.

Finite gradients give finite updates unless a setting is extreme (a learning rate of 1e38, an eps of 1e-40, a b1 that
is 1 in float32). An update that is not finite cannot be undone: the run then ends, and the state is not saved.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp

Guard: TypeAlias = dict[str, jax.Array]
"""`accepted` int32: number of applied steps. `skipped_in_a_row` int32: number of steps skipped since the last applied
one, or at least `NONFINITE_UPDATE` after a non-finite update. `gradient_norm` float32: uncorrected running mean."""

_DECAY = 0.99  # of the running mean of gradient norms
NONFINITE_UPDATE = 2**30  # ends the run whatever config.guard.abort_after is
_WARM = 100  # accepted steps before a norm can be called a spike: early ones fall by orders of magnitude


def new_guard() -> Guard:
    """Return the guard before the first step."""
    return {
        "accepted": jnp.zeros((), jnp.int32),
        "gradient_norm": jnp.zeros((), jnp.float32),
        "skipped_in_a_row": jnp.zeros((), jnp.int32),
    }


def should_apply(guard: Guard, loss: jax.Array, gradient_norm: jax.Array, spike_factor: float) -> jax.Array:
    """Return whether to apply a step with this loss and gradient norm (scalars), a boolean scalar."""
    good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    if not spike_factor:
        return good
    mean = guard["gradient_norm"] / (1 - _DECAY ** jnp.maximum(guard["accepted"], 1).astype(jnp.float32))
    return good & ((guard["accepted"] < _WARM) | (gradient_norm <= spike_factor * mean))


def update(guard: Guard, applied: jax.Array, finite: jax.Array, gradient_norm: jax.Array) -> Guard:
    """Return the guard after a step. `applied` and `finite` (of its update) are boolean scalars."""
    mean = _DECAY * guard["gradient_norm"] + (1 - _DECAY) * gradient_norm
    return {
        "accepted": guard["accepted"] + applied.astype(jnp.int32),
        "gradient_norm": jnp.where(applied, mean, guard["gradient_norm"]),
        "skipped_in_a_row": jnp.where(applied, jnp.where(finite, 0, NONFINITE_UPDATE), guard["skipped_in_a_row"] + 1),
    }
