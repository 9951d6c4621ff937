"""Metrics between two lines of the log, summed on the devices.

They are part of the train state, so that a resumed run writes the same log as an undisturbed one, and the host waits
for a step only when it reads them.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.flow.flow_map import FLOW_MAP_METRICS

Window: TypeAlias = dict[str, jax.Array]

METRICS = ("loss", "gradient_norm", "update_norm", "parameter_norm")
TIME_BUCKETS = 4  # equal parts of [0, 1] whose losses are logged separately
NAMED_SKIPS = 8  # skipped steps that a window remembers by number; more are only counted


def empty_window(more: Sequence[str] = ()) -> Window:
    """Return a window before its first step, with metrics of its objective beside METRICS."""
    names = (*METRICS, *more, "steps", "skipped", "largest_loss")
    scalars = {name: jnp.zeros((), jnp.float32) for name in names}
    buckets = {name: jnp.zeros(TIME_BUCKETS, jnp.float32) for name in ("time_loss", "time_examples")}
    # Zero stands for no step: steps are numbered from 1.
    steps = {name: jnp.zeros((), jnp.int32) for name in ("most_skipped_in_a_row", "largest_loss_step")}
    return scalars | buckets | steps | {"skipped_steps": jnp.zeros(NAMED_SKIPS, jnp.int32)}


def add_step(
    window: Window,
    number: jax.Array,  # of the step, from 1, int32
    applied: jax.Array,  # boolean
    finite: jax.Array,  # whether the update was finite, boolean
    metrics: Mapping[str, jax.Array],  # a scalar for each of METRICS, and for those of the objective
    t: jax.Array,  # times of the examples (B,)
    per_example: jax.Array,  # their losses (B,)
    skipped_in_a_row: jax.Array,  # the guard's count after the step, int32
) -> Window:
    """Return the window with one more step. Skipped and non-finite steps add to the counts and largest loss."""
    bucket = jnp.clip(jnp.floor(t * TIME_BUCKETS).astype(jnp.int32), 0, TIME_BUCKETS - 1)
    # A product with one-hot rows rather than a scatter: it adds in the same order on every mesh.
    rows = jax.nn.one_hot(bucket, TIME_BUCKETS, dtype=jnp.float32)  # (B, TIME_BUCKETS)
    new = {
        **metrics,
        "steps": jnp.float32(1),
        "time_loss": (rows * per_example[:, None]).sum(axis=0),
        "time_examples": rows.sum(axis=0),
    }
    sums = {
        name: window[name] + jnp.where(applied & finite, value, jnp.zeros_like(value)) for name, value in new.items()
    }
    next_place = jnp.arange(NAMED_SKIPS) == window["skipped"].astype(jnp.int32)
    larger = jnp.isfinite(metrics["loss"]) & (metrics["loss"] > window["largest_loss"])
    return sums | {
        "skipped": window["skipped"] + (~applied).astype(jnp.float32),
        "skipped_steps": jnp.where(next_place & ~applied, number, window["skipped_steps"]),
        "most_skipped_in_a_row": jnp.maximum(window["most_skipped_in_a_row"], skipped_in_a_row),
        "largest_loss": jnp.where(larger, metrics["loss"], window["largest_loss"]),
        "largest_loss_step": jnp.where(larger, number, window["largest_loss_step"]),
    }


def skipped_steps(window: Mapping[str, np.ndarray]) -> list[int]:
    """Return the numbers of the first skipped steps of the window."""
    return [int(number) for number in window["skipped_steps"] if number]


def window_means(window: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over the applied steps, the largest loss and its step, the loss of each time bucket, and `skipped`.

    Without an applied step, only `skipped`, the number of skipped steps.
    """
    means = {"skipped": float(window["skipped"])}
    if not window["steps"]:
        return means
    means |= {name: float(window[name] / window["steps"]) for name in window if name in METRICS + FLOW_MAP_METRICS}
    means |= {name: float(window[name]) for name in ("largest_loss", "largest_loss_step")}
    for bucket in range(TIME_BUCKETS):
        if window["time_examples"][bucket]:
            low, high = bucket / TIME_BUCKETS, (bucket + 1) / TIME_BUCKETS
            value = window["time_loss"][bucket] / window["time_examples"][bucket]
            means[f"loss_t{low:.2f}_{high:.2f}"] = float(value)
    return means
