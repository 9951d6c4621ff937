"""The state of a training run between two steps."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from mpdit_jax.distributed.mesh import parameter_sharding, replicated
from mpdit_jax.flow.flow_map import FLOW_MAP_METRICS
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.parameters import Parameters, abstract, split
from mpdit_jax.model.presets import build_model
from mpdit_jax.train.guard import Guard, new_guard
from mpdit_jax.train.metric_window import Window, empty_window


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "seed", "parameters", "ema_parameters", "optimizer_state", "guard", "window"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """A plain pytree. Random keys come from (seed, step), so the state alone decides every later step."""

    step: jax.Array  # steps done so far, int32 scalar
    seed: jax.Array  # uint32 scalar
    parameters: Parameters  # flat dict, float32
    ema_parameters: Parameters  # their exponential moving average, float32
    optimizer_state: optax.OptState
    guard: Guard  # decides whether the next step is applied, see `train.guard`
    window: Window  # metrics since the last line of the log, see `train.metric_window`


def initial_state(config: ModelConfig, optimizer: optax.GradientTransformation, seed: jax.Array) -> TrainState:
    """Return the state before the first step; the EMA starts at the initial parameters."""
    _, parameters = split(build_model(config, jax.random.key(seed)))
    return _state(config, optimizer, parameters, seed)


def _state(
    config: ModelConfig, optimizer: optax.GradientTransformation, parameters: Parameters, seed: jax.Array
) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        parameters=parameters,
        ema_parameters=jax.tree.map(jnp.copy, parameters),  # donated buffers may not be shared
        optimizer_state=optimizer.init(parameters),
        guard=new_guard(),
        window=empty_window(objective_metrics(config)),
    )


def objective_metrics(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the metrics that a model's objective logs beside those of every run."""
    return FLOW_MAP_METRICS if config.flow_map else ()


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of the state; allocates nothing."""
    _, parameters = abstract(config)
    shapes = jax.eval_shape(partial(_state, config, optimizer), parameters, jnp.uint32(0))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(mesh, path, leaf)), shapes
    )


def create_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, target: TrainState, seed: int
) -> TrainState:
    """Return the initial state laid out like `target` (see `abstract_state`). No device holds more than its share."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    create = jax.jit(partial(initial_state, config, optimizer), out_shardings=shardings)
    return create(jnp.uint32(seed))


def to_items(state: TrainState) -> dict[str, Any]:
    """Return the state as the named parts of a checkpoint, of which a sampler reads the moving average alone."""
    return {
        "parameters": state.parameters,
        "ema_parameters": state.ema_parameters,
        "optimizer": state.optimizer_state,
        "progress": {"step": state.step, "seed": state.seed, "guard": state.guard, "window": state.window},
    }


def from_items(items: dict[str, Any]) -> TrainState:
    """Invert `to_items`."""
    return TrainState(
        parameters=items["parameters"],
        ema_parameters=items["ema_parameters"],
        optimizer_state=items["optimizer"],
        **items["progress"],
    )


def _sharding(mesh: Mesh, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    # Optimizer moments sit in the same flat dict as the parameters, so the last key is the parameter's name.
    last = path[-1]
    if isinstance(last, jax.tree_util.DictKey) and leaf.ndim:
        return parameter_sharding(mesh, last.key, leaf.shape)
    return replicated(mesh)
