"""One step of a run again, with a look at everything in it: why was it left out?

Every step is a function of the state before it and of its batch, which is a function of (seed, step). So the state is
made again from the checkpoint before, and the step is taken apart. Nothing is written.
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
from mpdit_jax.data.sources import check_fits, load_source
from mpdit_jax.distributed.mesh import local_rows, make_mesh, place_batch
from mpdit_jax.errors import CheckpointError, ConfigError
from mpdit_jax.model.parameters import abstract
from mpdit_jax.train.guard import NONFINITE_UPDATE
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import TrainState, abstract_state, create_state, from_items, to_items
from mpdit_jax.train.step import (
    Draw,
    LossFunction,
    NoisyBatch,
    accumulated,
    build_train_step,
    jit_step,
    make_loss,
    make_noising,
)

_NAMED = 8  # examples and arrays that are named; more are counted


@dataclasses.dataclass(frozen=True)
class Replay:
    """What was found.

    Attributes:
        lines: for a person to read.
        sound: whether the step counts: everything in it is finite, and it does not spike.
    """

    lines: list[str]
    sound: bool


def replay(config: ConfigDict | FrozenConfigDict, workdir: str | Path, number: int) -> Replay:
    """Run step `number` of a run, counted from 1 as in its log, from the state before it.

    Args:
        config: as given to `train`.
        workdir: of the run; it is only read.
        number: the step.

    Raises:
        CheckpointError: no run there, or one of another config.
        ConfigError: a step that the run does not have, or several processes.
        DataError: see `load_source`.
    """
    workdir, config = Path(workdir), resolve(config)
    stored = load_config(workdir)
    steps = max(stored.steps, config.steps)
    if not 1 <= number <= steps:
        raise ConfigError(f"replay_step={number}: expected the number of a step of the run, 1 to {steps}.")
    if jax.process_count() > 1:
        raise ConfigError(f"replay_step={number}: expected a single process; the numbers are the same.")
    changed = differences(stored, config)
    if changed:
        named = ", ".join(f"{path}={new!r} instead of {old!r}" for path, (old, new) in changed.items())
        raise CheckpointError(f"{workdir} holds a run of another config ({named}): replay with the run's own.")
    architecture, mesh, source = model_config(config), make_mesh(**config.mesh), load_source(**config.data)
    check_fits(source, (*architecture.input_size, architecture.in_channels), architecture.num_classes)
    structure, optimizer = abstract(architecture)[0], make_optimizer(config.optimizer)
    draw, loss = make_noising(config, source.latents), make_loss(structure, config.mask_loss_weight)
    with jax.set_mesh(mesh):
        target = abstract_state(architecture, optimizer, mesh)
        before, lines = _newest_before(workdir, number, to_items(target))
        state = from_items(before) if before else create_state(architecture, optimizer, target, config.seed)
        rows = local_rows(config.batch_size, mesh)
        update = jit_step(build_train_step(config, structure, optimizer, source.latents), target, mesh)
        start = int(state.step)
        lines.append(f"steps {start + 1} to {number - 1} are run again first" if start < number - 1 else "ready")
        data = batches(source, config.batch_size, config.seed, start=start, rows=rows)
        for _ in range(start, number - 1):
            state = update(state, place_batch(next(data), rows, config.batch_size, mesh))
        host = batch_at(source, config.batch_size, config.seed, number - 1)
        batch = place_batch({name: value[rows] for name, value in host.items()}, rows, config.batch_size, mesh)
        found, sound = _take_apart(state, batch, host, draw, loss, optimizer, config.gradient_accumulation)
        skipped = int(update(state, batch).guard["skipped_in_a_row"])
    counts = skipped == 0
    verdict = "counts" if counts else "ends the run" if skipped >= NONFINITE_UPDATE else "is left out"
    if sound and not counts and config.guard.spike_factor:
        verdict += f": its gradient norm spikes (config.guard.spike_factor={config.guard.spike_factor:g})"
    return Replay([*lines, *found, f"step {number} (batch {number - 1}) {verdict}"], sound and counts)


def _newest_before(workdir: Path, number: int, targets: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole checkpoint of a step before `number`, or None for the initial state."""
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
    batch: dict[str, jax.Array],
    host: Mapping[str, np.ndarray],
    draw: Draw,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    accumulation: int,
) -> tuple[list[str], bool]:
    """What each stage of the step holds, and whether all of it is finite, the norms of all entries too."""
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    examples = jax.jit(draw)(batch, key)
    drawn = {name: array for name, array in examples._asdict().items() if array is not None}
    lines = [_rows("batch", host), _rows("drawn examples", drawn), _tree("parameters", state.parameters)]
    differentiate = partial(accumulated, loss, parts=accumulation)
    value, _, gradients = jax.jit(differentiate)(state.parameters, examples)
    updates, _ = jax.jit(optimizer.update)(gradients, state.optimizer_state, state.parameters)
    lines += [_tree("loss", {"loss": value}), _tree("gradients", gradients), _tree("updates", updates)]
    finite = all(line.endswith(_FINITE) for line in lines)
    after = optax.apply_updates(state.parameters, updates)
    norms = {
        name: float(optax.tree.norm(tree))
        for name, tree in (("gradient", gradients), ("update", updates), ("parameter", after))
    }
    lines.append(f"loss {float(value):.6g}, " + ", ".join(f"{name} norm {norm:.6g}" for name, norm in norms.items()))
    overflowing = [name for name, norm in norms.items() if not np.isfinite(norm)]
    if not finite:
        lines.append(_origin(differentiate, state, examples))
    elif overflowing:
        lines.append(f"every entry is finite, and of {' and '.join(overflowing)} the squares overflow float32")
    return lines, finite and not overflowing


_FINITE = ": all finite"


def _rows(what: str, arrays: Mapping[str, Any]) -> str:
    """Which rows of some arrays (B, ...) are not finite."""
    problems = []
    for name, array in arrays.items():
        values = np.asarray(array)
        finite = np.isfinite(values.astype(np.float32)).reshape(len(values), -1).all(axis=1)
        rows = np.flatnonzero(~finite)
        if len(rows):
            more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
            problems.append(f"{name} holds NaN or Inf in rows {', '.join(map(str, rows[:_NAMED]))}{more}")
    return f"{what}: {'; '.join(problems)}" if problems else what + _FINITE


def _tree(what: str, tree: Any) -> str:
    """Which arrays of a tree are not finite."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    finite = jax.device_get([jnp.isfinite(leaf).all() for _, leaf in leaves])
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, _), good in zip(leaves, finite, strict=True)
        if not good
    ]
    if not bad:
        return what + _FINITE
    more = f" and {len(bad) - _NAMED} more of {len(leaves)} arrays" if len(bad) > _NAMED else ""
    return f"{what}: NaN or Inf in {', '.join(bad[:_NAMED])}{more}"


def _origin(differentiate: Callable[..., Any], state: TrainState, examples: NoisyBatch) -> str:
    """Where a NaN first appears in the loss or its gradient, by JAX's checkify."""
    checked = checkify.checkify(differentiate, errors=checkify.float_checks)
    error, _ = jax.jit(checked)(state.parameters, examples)
    message = error.get()
    if message is None:
        return "no operation makes a NaN: what is not finite overflows to Inf, or was there before"
    return f"the first NaN: {' '.join(message.split())}"
