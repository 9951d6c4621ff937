"""One training step: loss, gradients, update, moving average."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from mpdit_jax.flow.objective import flow_matching_loss, time_distribution
from mpdit_jax.mesh import batch_sharding
from mpdit_jax.model.parameters import Parameters, Structure, merge
from mpdit_jax.training.state import TrainState

Batch: TypeAlias = dict[str, jax.Array]
"""`x` float32 (B, H, W, C) and `y` int32 (B,)."""
LossFunction: TypeAlias = Callable[[Parameters, Batch, jax.Array], jax.Array]
Step: TypeAlias = Callable[[TrainState, Batch], TrainState]


def make_loss(config: FrozenConfigDict, structure: Structure) -> LossFunction:
    """The training loss, a scalar function of (parameters, batch, key): label dropout, then flow matching."""
    times = time_distribution(config.time.distribution, config.time.mean, config.time.std)

    def loss(parameters: Parameters, batch: Batch, key: jax.Array) -> jax.Array:
        model = merge(structure, parameters)
        dropout_key, flow_key = jax.random.split(key)
        labels = drop_labels(dropout_key, batch["y"], config.label_dropout, model.num_classes)
        return flow_matching_loss(model, batch["x"], labels, key=flow_key, times=times)[0]

    return loss


def drop_labels(key: jax.Array, labels: jax.Array, rate: float, null: int) -> jax.Array:
    """Replace each label by the null class with probability `rate`; labels (B,)."""
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null, labels)


def make_step(loss: LossFunction, optimizer: optax.GradientTransformation, ema_decay: float) -> Step:
    """The update as a pure function of (state, batch); not yet jitted."""

    def step(state: TrainState, batch: Batch) -> TrainState:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        value, gradients = jax.value_and_grad(loss)(state.parameters, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        metrics = {
            "loss": value,
            "gradient_norm": optax.tree.norm(gradients),
            "update_norm": optax.tree.norm(updates),
            "parameter_norm": optax.tree.norm(parameters),
            "count": jnp.float32(1),
        }
        return TrainState(
            step=state.step + 1,
            seed=state.seed,
            parameters=parameters,
            ema_parameters=moving_average(state.ema_parameters, parameters, ema_decay),
            optimizer_state=optimizer_state,
            window={name: state.window[name] + metrics[name] for name in metrics},
        )

    return step


def moving_average(average: Parameters, parameters: Parameters, decay: float) -> Parameters:
    """decay * average + (1 - decay) * parameters."""
    return jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, average, parameters)


def jit_step(step: Step, state: TrainState, mesh: Mesh) -> Step:
    """Compile for the mesh: state laid out as `state` says (arrays or shapes) and donated, batch split over devices.

    Call it under `jax.set_mesh(mesh)`, which the model's activation constraints read.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=shardings, donate_argnums=0)
