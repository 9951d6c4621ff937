"""The training run, top to bottom."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.checkpoint.manager import Checkpoints
from mpdit_jax.checkpoint.reader import newest_in_words
from mpdit_jax.checkpoint.workdir import lock_workdir
from mpdit_jax.config.base import model_config, resolve, to_json
from mpdit_jax.data.info import identity, record_dataset
from mpdit_jax.data.pipeline import batches
from mpdit_jax.data.sources import check_fits, load_source
from mpdit_jax.distributed.collectives import (
    StopVote,
    any_process,
    assert_equal_across_processes,
    barrier,
    count_machines,
    run_on_process_0,
)
from mpdit_jax.distributed.mesh import check_batch, local_rows, make_mesh, place_batch
from mpdit_jax.errors import ConfigError, DataError, DivergedError
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.flow.sampler import make_sampler
from mpdit_jax.io import pictures as images
from mpdit_jax.model.accounting import count, training_flops
from mpdit_jax.model.parameters import Structure, abstract, merge
from mpdit_jax.runtime.hardware import peak_flops
from mpdit_jax.runtime.memory import return_freed
from mpdit_jax.runtime.signals import PreemptionHandler
from mpdit_jax.sample.decoding import Decode, make_decode
from mpdit_jax.train.evaluator import Evaluator
from mpdit_jax.train.guard import NONFINITE_UPDATE
from mpdit_jax.train.logger import RunLogger
from mpdit_jax.train.metric_window import empty_window, skipped_steps, window_means
from mpdit_jax.train.optimizer import make_optimizer, make_schedule
from mpdit_jax.train.prefetcher import Prefetcher
from mpdit_jax.train.profiling import Profiler
from mpdit_jax.train.state import TrainState, abstract_state, create_state, from_items, to_items
from mpdit_jax.train.step import build_train_step, jit_step
from mpdit_jax.train.stopwatch import Stopwatch
from mpdit_jax.train.writers import METRICS_FILE, check_wandb
from mpdit_jax.vae import PIXELS


def train(config: ConfigDict | FrozenConfigDict, workdir: str | Path) -> TrainState:
    """Train until `config.steps`, or until asked to stop; continue what the workdir holds.

    Args:
        config: an experiment's config, see `mpdit_jax.config.base_config`.
        workdir: where config, checkpoints, metrics, TensorBoard logs and sample grids go.

    Returns:
        The last state, which is also saved.

    Raises:
        ConfigError, DataError, CheckpointError, InputError: see each class; raised before anything is overwritten.
        DivergedError: too many steps in a row had to be left out, or an update was not finite.

    SIGTERM and SIGINT end the run after the step in hand, saved; the process ends if that takes longer than
    `config.checkpoint.grace`, or at once if no step was done yet, or on a second signal (see `PreemptionHandler`).
    """
    workdir, config = Path(workdir), resolve(config)
    check_wandb(config.log.wandb_project)
    architecture = model_config(config)
    mesh = make_mesh(**config.mesh)
    check_batch(config.batch_size, mesh, config.gradient_accumulation)
    source = load_source(**config.data)
    structure, _ = abstract(architecture)
    check_fits(source, (*architecture.input_size, architecture.in_channels), architecture.num_classes)
    assert_equal_across_processes(identity(source))  # each process reads what lies at its own config.data.path
    optimizer = make_optimizer(config.optimizer)
    platform = jax.devices()[0].platform
    if architecture.attention == "cudnn" and platform != "gpu":
        raise ConfigError(f"config.model.attention='cudnn' needs an NVIDIA GPU and this is {platform}: use 'xla'.")

    with (
        jax.set_mesh(mesh),
        # Outside Checkpoints: a signal must not cut off the last save.
        PreemptionHandler(config.checkpoint.grace, partial(newest_in_words, workdir)) as stop,
        lock_workdir(workdir, config) as claim,
        Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every) as checkpoints,
    ):
        stop.nothing_to_save = jax.process_count() == 1
        target = abstract_state(architecture, optimizer, mesh)
        restored = checkpoints.restore_newest(to_items(target))
        if restored is not None:
            step, state = restored.step, from_items(restored.items)
        else:
            step, state = 0, create_state(architecture, optimizer, target, config.seed)
        is_primary = jax.process_index() == 0
        run_on_process_0(partial(record_dataset, workdir, source, trained=step > 0))
        in_pixels = source.latents is not None and source.latents.vae_fingerprint == PIXELS
        decode = make_decode(str(workdir), config.sample.vae) if config.sample.vae or in_pixels else None
        evaluator = Evaluator(config, workdir, source, structure, decode, lambda: stop.name is not None)
        unevaluated = evaluator.pending(step)
        if is_primary:
            for note in (*([claim.note] if claim.note else []), *(restored.notes if restored is not None else [])):
                print(f"{note}.")
        if step >= config.steps and not unevaluated:
            if is_primary:
                print(f"{workdir} is done: {step} of {config.steps} steps. For more: --config.steps={2 * step}")
            return state
        if is_primary:
            log_startup(config, workdir, step, state, len(source), mesh)

        update = jit_step(build_train_step(config, structure, optimizer, source.latents), target, mesh)
        done = jax.jit(jnp.copy)  # the state itself is taken over by the next step
        fresh_window = jax.jit(empty_window, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target.window))
        learning_rate = make_schedule(config.optimizer)
        rows = local_rows(config.batch_size, mesh)
        feed = Prefetcher(
            batches(source, config.batch_size, config.seed, start=step, rows=rows, threads=config.data.threads),
            lambda batch: place_batch(batch, rows, config.batch_size, mesh),
        )

        save_unplanned = partial(_save_unplanned, checkpoints)
        check_skips = partial(_check_skips, checkpoints, config.guard.abort_after)

        def before_write(step: int, state: TrainState) -> int:
            """Check that the workdir is still ours and the state sound: how many steps were left out in a row."""
            claim.check()
            return check_skips(step, state)

        machines = count_machines() if platform == "cpu" else 1  # a pod need not be asked: its peak is published
        peak = run_on_process_0(partial(peak_flops, mesh, architecture.dtype, machines))
        watch, vote = Stopwatch(config.batch_size, training_flops(architecture, config.mask_ratio), peak), StopVote()
        with (
            RunLogger(
                workdir,
                step,
                config.steps,
                config.batch_size,
                is_primary=is_primary,
                wandb_project=config.log.wandb_project,
            ) as report,
            watch,
            Profiler(
                workdir / "tensorboard", config.profile.start, config.profile.steps if is_primary else 0
            ) as profiler,
        ):
            report.config(step, to_json(config))
            if unevaluated:  # an earlier start ended in the middle of it
                _evaluate(evaluator, step, state, report)
            while step < config.steps and not vote.asked(stop.name is not None, step):
                with watch.of("data_wait"):
                    try:
                        batch = feed.take()
                    except DataError:
                        if step and jax.process_count() == 1:  # saving takes all, and the others do not know
                            before_write(step, state)
                            save_unplanned(step, state)
                        raise
                with profiler.step(step), jax.transfer_guard("disallow"):
                    state = update(state, batch)
                stop.nothing_to_save = False
                watch.step(done(state.step))  # before the next batch is waited for
                if step + 1 < config.steps:
                    with watch.of("data_wait"):
                        feed.prefetch()
                if profiler.ends_with(step):
                    jax.block_until_ready(state)
                    with watch.of("other"):
                        profiler.finish()
                    report.say(f"profile of {config.profile.steps} steps written to {workdir / 'tensorboard'}")
                step += 1
                last = step == config.steps
                report.advance(step)
                if step % config.log.every == 0 or last:
                    claim.check()
                    window, accepted = jax.device_get((state.window, state.guard["accepted"]))
                    # That of the last step that was made.
                    means = window_means(window) | {"learning_rate": float(learning_rate(max(int(accepted) - 1, 0)))}
                    report.metrics(step, means, watch.lap())
                    report.skipped(skipped_steps(window), int(window["skipped"]))
                    check_skips(step, state)
                    state = dataclasses.replace(state, window=fresh_window())
                if step % config.checkpoint.every == 0 or last:
                    # While steps are left out, what broke them may be in the parameters: older states are good.
                    skipped = before_write(step, state)
                    if last or not skipped:
                        with watch.of("other"):
                            checkpoints.save(step, to_items(state))
                draws = config.sample.every and (step % config.sample.every == 0 or last)
                if draws and (last or not any_process(stop.name is not None)):  # there may be little time to save
                    before_write(step, state)
                    with watch.of("other"):
                        picture = draw_grid(
                            config, structure, state, decode, None if last else lambda: stop.name is not None
                        )
                        if picture is not None:
                            report.picture(step, picture)
                        barrier("the grid is drawn")  # by the first process alone
                if evaluator.due(step):  # after the checkpoint, from which it is made up for when it is cut off
                    before_write(step, state)
                    with watch.of("other"):
                        _evaluate(evaluator, step, state, report)
                        return_freed()
            if 0 < step < config.steps:
                stop.begin_grace()
                before_write(step, state)
                report.say(f"{stop.name or 'another process was asked to stop'}: saving step {step}")
                save_unplanned(step, state)
    return state


def draw_grid(
    config: FrozenConfigDict,
    structure: Structure,
    state: TrainState,
    decode: Decode | None = None,
    stopped: Callable[[], bool] | None = None,
) -> np.ndarray | None:
    """A guided grid from the EMA weights, one row a class, with the same noise every time.

    None for arrays that are no pictures and not decoded to any, where `stopped` while they are decoded, and on every
    process but the first.
    """
    if decode is None and (config.data.name == "latents" or config.model.in_channels not in (1, 3)):
        return None
    parameters = state.ema_parameters
    mesh = jax.sharding.get_mesh()
    if jax.process_count() > 1:
        parameters = multihost_utils.process_allgather(parameters, tiled=True)
        if jax.process_index() > 0:
            return None
        mesh = make_mesh(devices=jax.local_devices()[:1])
    classes = min(config.model.num_classes, 10)
    labels = np.repeat(np.arange(classes), config.sample.per_class)
    sampler = make_sampler(steps=config.sample.steps, guidance_scale=config.sample.guidance_scale)
    with jax.set_mesh(mesh):
        latents = sampler(merge(structure, parameters), labels, seed_key(config.seed))
    if decode is None:
        pictures = np.asarray(latents)
    else:
        rows = np.split(np.asarray(latents), classes)  # a row at a time: a VAE takes far more memory
        decoded = []
        for row in rows:
            if stopped is not None and stopped():
                return None
            decoded.append(np.asarray(decode(jnp.asarray(row))))
        pictures = np.concatenate(decoded)
    # Black where the model has diverged for now: the guard judges steps, and a picture must not end the run.
    pictures = np.where(np.isfinite(pictures), pictures, -1)
    return images.grid(images.to_uint8(pictures), config.sample.per_class)


def log_startup(
    config: FrozenConfigDict, workdir: Path, step: int, state: TrainState, examples: int, mesh: Mesh
) -> None:
    """Print what starts, or continues, on process 0."""
    parameters, macs = count(model_config(config))
    if step == 0:
        if (workdir / METRICS_FILE).exists():
            print(f"an earlier start of this run left no checkpoint in {workdir}; it begins again")
        print(parameter_overview.get_parameter_overview(state.parameters, include_stats=False))
    several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(
        f"{'continuing' if step else 'starting'} at step {step} in {workdir}: {examples:,} images, "
        f"{parameters / 1e6:.2f} M parameters, {macs / 1e9:.3f} GMACs a forward pass, "
        f"{mesh.size} {mesh.devices.flat[0].platform} device(s){several}",
        flush=True,
    )


def _evaluate(evaluator: Evaluator, step: int, state: TrainState, report: RunLogger) -> None:
    found = evaluator(step, state.ema_parameters, report.say)
    report.evaluation(step, found)
    if not found:
        report.say(f"the evaluation of step {step} was cut off: the same command makes up for it")


def _save_unplanned(checkpoints: Checkpoints, step: int, state: TrainState) -> None:
    """Save in the middle of steps that are left out as well, but then let go of none that is known to be good."""
    checkpoints.save(step, to_items(state), keep_older=bool(jax.device_get(state.guard["skipped_in_a_row"])))


def _check_skips(checkpoints: Checkpoints, abort_after: int, step: int, state: TrainState) -> int:
    """How many steps up to this one were left out in a row.

    Raises:
        DivergedError: `abort_after` or more were since the last line of the log, also where later ones counted again,
            or an update was not finite.
    """
    most, now = map(int, jax.device_get((state.window["most_skipped_in_a_row"], state.guard["skipped_in_a_row"])))
    skipped = max(most, now)
    if skipped < abort_after and skipped < NONFINITE_UPDATE:
        return now
    checkpoints.wait()
    kept = checkpoints.latest_step()
    newest = f"the newest checkpoint is of {'no step' if kept is None else f'step {kept}'}"
    if skipped >= NONFINITE_UPDATE:
        raise DivergedError(
            f"by step {step}, an update made of finite gradients was not finite or its squares overflowed, and "
            f"{newest}: start again in a new --workdir with a lower config.optimizer.learning_rate, a larger "
            "config.optimizer.eps, or b1 and b2 less near 1."
        )
    raise DivergedError(
        f"by step {step}, {skipped} steps in a row were left out, since loss or gradient was not finite or spiked, "
        f"and {newest}: look for broken data, or start again in a new --workdir with a lower "
        "config.optimizer.learning_rate."
    )
