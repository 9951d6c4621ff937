"""Training in memory, without a workdir, for studies of many short runs."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mpdit_jax.config import model_config, resolve
from mpdit_jax.data.pipeline import batches
from mpdit_jax.data.sources import load_source
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import DivergedError
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.train.guard import NONFINITE_UPDATE
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import TrainState, abstract_state, create_state
from mpdit_jax.train.step import build_train_step, jit_step


class Trainer:
    """The train step of a config on one device, compiled once for all seeds."""

    def __init__(self, config: ConfigDict, kind: type[MPDiT] = MPDiT) -> None:
        """`kind` is the model's class: MPDiT, or one with the same parameters that uses them otherwise."""
        self.config = resolve(config)
        self.model = model_config(self.config)
        self.structure = nnx.graphdef(nnx.eval_shape(lambda: kind(self.model, nnx.Rngs(params=0))))
        self.source = load_source(**self.config.data)
        self._optimizer, self._mesh = make_optimizer(self.config.optimizer), make_mesh(devices=jax.devices()[:1])
        step = build_train_step(self.config, self.structure, self._optimizer, self.source.latents)
        self._target = abstract_state(self.model, self._optimizer, self._mesh)
        self._update = jit_step(step, self._target, self._mesh)

    def states(self, seed: int, start: Mapping[str, np.ndarray] | None = None) -> Iterator[TrainState]:
        """Train and yield the state after each of `config.steps` updates, whose buffers the next update reuses.

        `state.window` sums metrics and skipped steps since the start. `start` are parameters to begin with, also of the
        moving average; those it lacks, and all others by default, are drawn.

        Raises:
            DivergedError: after the last update, if any update was not finite.
        """
        rows = np.arange(self.config.batch_size)
        feed = batches(self.source, self.config.batch_size, seed, start=0, rows=rows)
        state = self.first_state(seed, start)
        for _, batch in zip(range(self.config.steps), feed, strict=False):
            state = self.update(state, batch)
            yield state
        if int(state.window["most_skipped_in_a_row"]) >= NONFINITE_UPDATE:
            raise DivergedError(
                f"in {self.config.steps} steps with seed {seed}, an update made of finite gradients was not finite "
                "or its squares overflowed: lower config.optimizer.learning_rate."
            )

    def first_state(self, seed: int, start: Mapping[str, np.ndarray] | None = None) -> TrainState:
        """Return the state before the first step; `start` as for `states`."""
        with jax.set_mesh(self._mesh):
            state = create_state(self.model, self._optimizer, self._target, seed)
        if start is None:
            return state
        parameters = state.parameters | {name: jnp.asarray(array) for name, array in start.items()}
        average = jax.tree.map(jnp.copy, parameters)  # donated buffers may not be shared
        return dataclasses.replace(state, parameters=parameters, ema_parameters=average)

    def update(self, state: TrainState, batch: Mapping[str, np.ndarray]) -> TrainState:
        """Return the state after one step; the buffers of `state` are reused."""
        with jax.set_mesh(self._mesh):
            return self._update(state, jax.tree.map(jnp.asarray, dict(batch)))
