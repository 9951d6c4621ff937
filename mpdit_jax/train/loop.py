"""The training loop."""

from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.checkpoint.workdir import lock_workdir
from mpdit_jax.config.base import model_config, resolve
from mpdit_jax.data.pipeline import batches
from mpdit_jax.distributed.mesh import local_rows, make_mesh, place_batch
from mpdit_jax.model.parameters import abstract
from mpdit_jax.train.evaluator import Evaluator
from mpdit_jax.train.grid import choose_decode, draw_grid, grid_classes
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.policy import make_policy
from mpdit_jax.train.prefetcher import Prefetcher
from mpdit_jax.train.run import Run
from mpdit_jax.train.startup import continued, first_state, load_data, log_startup, make_stopwatch, record_data
from mpdit_jax.train.state import TrainState, abstract_state
from mpdit_jax.train.step import build_train_step, jit_step


def train(config: ConfigDict | FrozenConfigDict, workdir: str | Path) -> TrainState:
    """Train until `config.steps`, or until asked to stop; continue the run that the workdir holds.

    Args:
        config: an experiment's config, see `mpdit_jax.config.base_config`.
        workdir: folder for config, checkpoints, metrics, TensorBoard logs and sample grids.

    Returns:
        The last state, which is also saved.

    Raises:
        ConfigError, DataError, CheckpointError, InputError: see each class; raised before anything is overwritten.
        DivergedError: too many steps in a row had to be left out, or an update was not finite.

    On SIGTERM or SIGINT the run finishes its step, saves and returns. The process ends if that takes longer than
    `config.checkpoint.grace`, and at once before the first step or on a second signal (see `PreemptionHandler`).
    """
    workdir = Path(workdir)
    config = continued(resolve(config), workdir)
    mesh = make_mesh(**config.mesh)
    source = load_data(config, mesh)
    model, optimizer = model_config(config), make_optimizer(config.optimizer)
    structure, _ = abstract(model)
    lock, policy = lock_workdir(workdir, config), make_policy(config, mesh)

    with jax.set_mesh(mesh), Run(config, workdir, lock, policy) as run:
        target = abstract_state(model, optimizer, mesh)
        step, state = run.restore(target) or (0, first_state(config, model, optimizer, target))
        record_data(workdir, source, step)
        decode = choose_decode(config, workdir, source)
        evaluator = Evaluator(config, workdir, source, structure, decode, run.stopped)
        unevaluated = evaluator.pending(step)  # an earlier start ended in the middle of its evaluation
        done = step >= config.steps and not unevaluated
        log_startup(config, workdir, step, source, mesh, decode, done)
        if done:
            return state
        train_step = jit_step(build_train_step(config, structure, optimizer, source.latents), target, mesh)
        draw = partial(draw_grid, config, structure, decode, grid_classes(source, model.num_classes))
        rows = local_rows(config.batch_size, mesh)
        data = Prefetcher(
            batches(source, config.batch_size, config.seed, start=step, rows=rows, threads=config.data.threads),
            lambda batch: place_batch(batch, rows, config.batch_size, mesh),
        )
        run.start(step, make_stopwatch(config, mesh))
        if unevaluated:
            run.record(step, state, evaluator)

        while step < config.steps and not run.should_stop(step):
            batch = run.take(data, step, state)
            with run.dispatch(step):
                state = train_step(state, batch)
            step += 1
            run.advance(step, state, data)
            state = run.log(step, state)
            run.save(step, state)
            run.show(step, state, draw)
            run.record(step, state, evaluator)
        run.save_on_stop(step, state)
    return state
