"""How a `Run` saves, logs and checks the states of `train`."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from mpdit_jax.config.base import model_config
from mpdit_jax.distributed.mesh import replicated
from mpdit_jax.errors import DivergedError
from mpdit_jax.train.guard import NONFINITE_UPDATE
from mpdit_jax.train.metric_window import empty_window, skipped_steps, window_means
from mpdit_jax.train.optimizer import make_schedule
from mpdit_jax.train.run import Policy
from mpdit_jax.train.state import TrainState, from_items, objective_metrics, to_items


def make_policy(config: FrozenConfigDict, mesh: Mesh) -> Policy[TrainState]:
    """Log the means of the metric window; end the run by the guard's counts and `config.guard.abort_after`."""
    learning_rate = make_schedule(config.optimizer)
    more = objective_metrics(model_config(config))
    new_window = jax.jit(partial(empty_window, more), out_shardings=replicated(mesh))

    def metrics(step: int, state: TrainState) -> tuple[dict[str, float], list[int]]:
        window, accepted = jax.device_get((state.window, state.guard["accepted"]))
        rate = float(learning_rate(max(int(accepted) - 1, 0)))  # the schedule's value at the last accepted step
        return window_means(window) | {"learning_rate": rate}, skipped_steps(window)

    def reset_metrics(state: TrainState) -> TrainState:
        return dataclasses.replace(state, window=new_window())

    def check(step: int, state: TrainState, newest: Callable[[], str]) -> int:
        most, now = map(int, jax.device_get((state.window["most_skipped_in_a_row"], state.guard["skipped_in_a_row"])))
        skipped = max(most, now)  # most in a row since the last log line, even if a later step was applied
        if skipped >= NONFINITE_UPDATE:
            raise DivergedError(
                f"by step {step}, an update made of finite gradients was not finite or its squares overflowed, and "
                f"{newest()}: start again in a new --workdir with a lower config.optimizer.learning_rate, a larger "
                "config.optimizer.eps, or b1 and b2 less near 1."
            )
        if skipped >= config.guard.abort_after:
            raise DivergedError(
                f"by step {step}, {skipped} steps in a row were left out, since loss or gradient was not finite or "
                f"spiked, and {newest()}: look for broken data, or start again in a new --workdir with a lower "
                "config.optimizer.learning_rate."
            )
        return now

    return Policy(to_items, from_items, metrics, reset_metrics, check)
