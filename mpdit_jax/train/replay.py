"""Replay of one step of a run, to find out why it was skipped: everything in it that is not finite is named.

The state before the step is computed again from the newest checkpoint before it, which gives the same bits. Nothing is
written.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import checkify
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.checkpoint.load import load_config
from mpdit_jax.checkpoint.reader import CHECKPOINTS, list_steps, read_step
from mpdit_jax.config.base import differences, model_config, resolve
from mpdit_jax.data.pipeline import batch_at, batches
from mpdit_jax.distributed.mesh import batch_sharding, make_mesh
from mpdit_jax.errors import CheckpointError, ConfigError
from mpdit_jax.model.parameters import abstract
from mpdit_jax.train import step as steps
from mpdit_jax.train.guard import NONFINITE_UPDATE
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.startup import continued, first_state, load_data
from mpdit_jax.train.state import TrainState, abstract_state, from_items, to_items

_NAMED = 8  # rows and arrays that are named; more are counted
_FINITE = ": all finite"


@dataclasses.dataclass(frozen=True)
class Replay:
    """The findings of a replay."""

    lines: list[str]  # for a person to read
    sound: bool  # everything in the step is finite, and it does not spike


def replay(config: ConfigDict | FrozenConfigDict, workdir: str | Path, number: int) -> Replay:
    """Run step `number` of a run, counted from 1 as in its log, from the state before it; config as for `train`.

    Raises:
        CheckpointError: no run there, or one of another config.
        ConfigError: a step that the run does not have, or several processes.
        DataError: see `load_source`.
    """
    workdir = Path(workdir)
    stored, config = load_config(workdir), continued(resolve(config), workdir)
    last = max(stored.steps, config.steps)
    if not 1 <= number <= last:
        raise ConfigError(f"replay_step={number}: expected the number of a step of the run, 1 to {last}.")
    if jax.process_count() > 1:
        raise ConfigError(f"replay_step={number}: expected a single process; the numbers are the same.")
    if changed := differences(stored, config):
        named = ", ".join(f"{path}={new!r} instead of {old!r}" for path, (old, new) in changed.items())
        raise CheckpointError(f"{workdir} holds a run of another config ({named}): replay with the run's own.")
    model, optimizer, mesh = model_config(config), make_optimizer(config.optimizer), make_mesh(**config.mesh)
    source, size, structure = load_data(config, mesh), config.batch_size, abstract(model)[0]
    place = partial(jax.device_put, device=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        target = abstract_state(model, optimizer, mesh)
        before, lines = _newest_before(workdir, number, to_items(target))
        state = from_items(before) if before else first_state(config, model, optimizer, target)
        train_step = steps.jit_step(steps.build_train_step(config, structure, optimizer, source.latents), target, mesh)
        start = int(state.step)
        lines.append(f"steps {start + 1} to {number - 1} are run again first" if start < number - 1 else "ready")
        data = batches(source, size, config.seed, start=start)
        for _ in range(start, number - 1):
            state = train_step(state, place(next(data)))
        host = batch_at(source, size, config.seed, number - 1)
        batch = place(host)
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        noisy = jax.jit(steps.make_noising(config, source.latents))(batch, key)
        loss = steps.config_loss(config, structure)
        found, sound = _take_apart(state, host, noisy, loss, optimizer, config.gradient_accumulation)
        skipped = int(train_step(state, batch).guard["skipped_in_a_row"])
    verdict = "is applied" if not skipped else "ends the run" if skipped >= NONFINITE_UPDATE else "is skipped"
    if sound and skipped and config.guard.spike_factor:
        verdict += f": its gradient norm spikes (config.guard.spike_factor={config.guard.spike_factor:g})"
    return Replay([*lines, *found, f"step {number} (batch {number - 1}) {verdict}"], sound and not skipped)


def _newest_before(workdir: Path, number: int, targets: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the newest whole checkpoint before step `number`, None for the initial state, and notes about it."""
    lines = []
    for step in reversed([step for step in list_steps(workdir) if 0 < step < number]):
        try:
            items = read_step(workdir.resolve() / CHECKPOINTS / str(step), targets)
        except CheckpointError as error:
            lines.append(str(error))
            continue
        return items, [*lines, f"from the checkpoint of step {step}"]
    return None, [*lines, "from the initial state"]


def _take_apart(
    state: TrainState,
    host: Mapping[str, np.ndarray],
    noisy: steps.NoisyBatch,
    loss: steps.LossFunction,
    optimizer: optax.GradientTransformation,
    accumulation: int,
) -> tuple[list[str], bool]:
    """Return a line for each stage of the step, and whether all of it is finite, the norms included."""
    drawn = {name: array for name, array in noisy._asdict().items() if array is not None}
    differentiate = partial(steps.accumulated, loss, parts=accumulation)
    value, _, gradients = jax.jit(differentiate)(state.parameters, noisy)
    updates, _ = jax.jit(optimizer.update)(gradients, state.optimizer_state, state.parameters)
    trees = {"parameters": state.parameters, "loss": {"loss": value}, "gradients": gradients, "updates": updates}
    lines = [_rows("batch", host), _rows("drawn examples", drawn), *(_tree(*item) for item in trees.items())]
    finite = all(line.endswith(_FINITE) for line in lines)
    after = optax.apply_updates(state.parameters, updates)
    named = {"gradient": gradients, "update": updates, "parameter": after}
    norms = {name: float(optax.tree.norm(tree)) for name, tree in named.items()}
    lines.append(f"loss {float(value):.6g}, " + ", ".join(f"{name} norm {norm:.6g}" for name, norm in norms.items()))
    overflowing = [name for name, norm in norms.items() if not np.isfinite(norm)]
    if not finite:
        lines.append(_origin(differentiate, state, noisy))
    elif overflowing:
        lines.append(f"every entry is finite, but the squares of {' and '.join(overflowing)} overflow float32")
    return lines, finite and not overflowing


def _rows(what: str, arrays: Mapping[str, Any]) -> str:
    """Which rows of some arrays (B, ...) are not finite."""
    problems = []
    for name, array in arrays.items():
        values = np.asarray(array)
        rows = np.flatnonzero(~np.isfinite(values.astype(np.float32)).reshape(len(values), -1).all(axis=1))
        if len(rows):
            more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
            problems.append(f"{name} holds NaN or Inf in rows {', '.join(map(str, rows[:_NAMED]))}{more}")
    return f"{what}: {'; '.join(problems)}" if problems else what + _FINITE


def _tree(what: str, tree: Any) -> str:
    """Which arrays of a tree are not finite."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    finite = jax.device_get([jnp.isfinite(leaf).all() for _, leaf in leaves])
    pairs = zip(leaves, finite, strict=True)
    bad = [jax.tree_util.keystr(path, simple=True, separator="/") for (path, _), good in pairs if not good]
    if not bad:
        return what + _FINITE
    more = f" and {len(bad) - _NAMED} more of {len(leaves)} arrays" if len(bad) > _NAMED else ""
    return f"{what}: NaN or Inf in {', '.join(bad[:_NAMED])}{more}"


def _origin(differentiate: Callable[..., Any], state: TrainState, noisy: steps.NoisyBatch) -> str:
    """Where a NaN first appears in the loss or its gradient, by JAX's checkify."""
    checked = checkify.checkify(differentiate, errors=checkify.float_checks)
    message = jax.jit(checked)(state.parameters, noisy)[0].get()
    if message is None:
        return "no operation makes a NaN: what is not finite overflows to Inf, or was there before"
    return f"the first NaN: {' '.join(message.split())}"
