"""Which steps count: one whose loss or gradient is not finite, or spikes, changes nothing and is counted as left out.

One whose update overflows, which no finite gradient brings about at a sane learning rate, can't be undone: it is
counted as left out with all that follow, until the run ends and its newest good checkpoint is what remains.
"""

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


def judge(guard: Guard, loss: jax.Array, gradient_norm: jax.Array, spike_factor: float) -> jax.Array:
    """Whether a step with this loss and gradient norm (scalars) is to count, a boolean scalar."""
    good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    if not spike_factor:
        return good
    mean = guard["gradient_norm"] / (1 - _DECAY ** jnp.maximum(guard["accepted"], 1).astype(jnp.float32))
    return good & ((guard["accepted"] < _WARM) | (gradient_norm <= spike_factor * mean))


def accept(guard: Guard, good: jax.Array, counts: jax.Array, gradient_norm: jax.Array) -> Guard:
    """The guard after a step that was made (`good`) or not, and that counts or is left out."""
    mean = _DECAY * guard["gradient_norm"] + (1 - _DECAY) * gradient_norm
    return {
        "accepted": guard["accepted"] + good,
        "gradient_norm": jnp.where(good, mean, guard["gradient_norm"]),
        "skipped_in_a_row": jnp.where(counts, 0, guard["skipped_in_a_row"] + 1),
    }
