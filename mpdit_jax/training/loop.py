"""The training run, top to bottom."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax import images
from mpdit_jax.checkpoint import Checkpoints, claim_workdir
from mpdit_jax.config import model_of, resolve, to_json
from mpdit_jax.data.pipeline import batches
from mpdit_jax.data.sources import check_fits, load_source
from mpdit_jax.errors import ConfigError, DataError, DivergedError
from mpdit_jax.flow.sampler import make_sampler
from mpdit_jax.mesh import batch_sharding, check_batch, make_mesh
from mpdit_jax.model.accounting import count
from mpdit_jax.model.parameters import Structure, abstract, merge
from mpdit_jax.training.interrupt import StopRequest
from mpdit_jax.training.observe import MetricsFile, ProgressLine, TensorBoard
from mpdit_jax.training.optimizer import make_optimizer
from mpdit_jax.training.state import (
    WINDOW_METRICS,
    TrainState,
    abstract_state,
    create_state,
    empty_window,
    from_items,
    to_items,
)
from mpdit_jax.training.step import jit_step, make_loss, make_step


def train(config: ConfigDict | FrozenConfigDict, workdir: str | Path) -> TrainState:
    """Train until `config.steps`, or until asked to stop; continue what the workdir holds.

    Args:
        config: an experiment's config, see `mpdit_jax.config.base_config`.
        workdir: where config, checkpoints, metrics, TensorBoard logs and sample grids go.

    Returns:
        The last state, which is also saved.

    Raises:
        ConfigError, DataError, CheckpointError, InputError: see each class; raised before anything is overwritten.
        DivergedError: the loss is no longer a number.
    """
    workdir, config = Path(workdir), resolve(config)
    model_config = model_of(config)
    mesh = make_mesh(**config.mesh)
    check_batch(config.batch_size, mesh)
    source = load_source(config.data.name, config.data.path, config.data.split)
    structure, _ = abstract(model_config)
    check_fits(source, (*model_config.input_size, model_config.in_channels), model_config.num_classes)
    optimizer = make_optimizer(config.optimizer)
    platform = jax.devices()[0].platform
    if model_config.attention == "cudnn" and platform != "gpu":
        raise ConfigError(f"config.model.attention='cudnn' needs an NVIDIA GPU and this is {platform}: use 'xla'.")

    with (
        jax.set_mesh(mesh),
        StopRequest() as stop,  # outside Checkpoints: a signal must not cut off the last save
        claim_workdir(workdir, config),
        Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every) as checkpoints,
    ):
        target = abstract_state(model_config, optimizer, mesh)
        step = checkpoints.latest_step() or 0
        if step:
            state = from_items(checkpoints.restore(step, to_items(target)))
        else:
            state = create_state(model_config, optimizer, mesh, config.seed)
        if step >= config.steps:
            print(f"{workdir} is done: {step} of {config.steps} steps. For more: --config.steps={2 * step}")
            return state

        parameters, macs = count(model_config)
        if step == 0:
            print(parameter_overview.get_parameter_overview(state.parameters, include_stats=False))
        print(
            f"{'continuing' if step else 'starting'} at step {step} in {workdir}: {len(source):,} images, "
            f"{parameters / 1e6:.2f} M parameters, {macs / 1e9:.3f} GMACs a forward pass, "
            f"{mesh.size} {platform} device(s)"
        )
        update = jit_step(make_step(make_loss(config, structure), optimizer, config.ema_decay), target, mesh)
        data = batches(source, config.batch_size, config.seed, start=step)

        with (
            closing(MetricsFile(workdir / "metrics.jsonl", step)) as metrics_file,
            closing(TensorBoard(workdir / "tensorboard", step)) as tensorboard,
            ProgressLine(step, config.steps, config.batch_size) as progress,
        ):
            tensorboard.text(step, "config", f"```json\n{to_json(config)}```")
            while step < config.steps and stop.name is None:
                try:
                    batch = next(data)
                except DataError:
                    _save(checkpoints, step, state)
                    raise
                state = update(state, jax.device_put(batch, batch_sharding(mesh)))
                step += 1
                last = step == config.steps
                progress.advance(step)
                if step % config.log.every == 0 or last:
                    metrics = _window_means(state)
                    state = _with_empty_window(state, target)
                    metrics_file.write(step, metrics)
                    rate = {"images_per_second": progress.images_per_second(step)}
                    tensorboard.scalars(step, metrics | rate)
                    progress.logged(step, metrics["loss"])
                    _check_finite(metrics, step, checkpoints)
                if step % config.checkpoint.every == 0 or last:
                    _save(checkpoints, step, state)
                if config.sample.every and (step % config.sample.every == 0 or last):
                    picture = draw_grid(config, structure, state)
                    if picture is not None:
                        images.save_png(workdir / "samples" / f"{step:08d}.png", picture)
                        tensorboard.image(step, "samples", picture)
            if stop.name is not None:
                progress.say(f"{stop.name}: saving step {step}")
                _save(checkpoints, step, state)
    return state


def draw_grid(config: FrozenConfigDict, structure: Structure, state: TrainState) -> np.ndarray | None:
    """A guided grid from the EMA weights, one row a class, with the same noise every time; None for latents."""
    model = merge(structure, state.ema_parameters)
    if model.input_shape[-1] not in (1, 3):
        return None
    classes = min(model.num_classes, 10)
    labels = np.repeat(np.arange(classes), config.sample.per_class)
    sampler = make_sampler(steps=config.sample.steps, guidance_scale=config.sample.guidance_scale)
    latents = sampler(model, labels, jax.random.key(config.seed))
    return images.grid(images.to_uint8(np.asarray(latents)), config.sample.per_class)


def _save(checkpoints: Checkpoints, step: int, state: TrainState) -> None:
    """Save unless the run has diverged since the last log line: a broken state must not push out good ones."""
    _check_finite(jax.device_get(state.window), step, checkpoints)
    checkpoints.save(step, to_items(state))


def _check_finite(metrics: Mapping[str, float], step: int, checkpoints: Checkpoints) -> None:
    for name, value in metrics.items():
        if not np.isfinite(value):
            kept = checkpoints.latest_step()
            raise DivergedError(
                f"the {name} is {value} by step {step}, and the newest checkpoint is of "
                f"{'no step' if kept is None else f'step {kept}'}: look for broken data, or start again in a new "
                "--workdir with a lower config.optimizer.learning_rate."
            )


def _window_means(state: TrainState) -> dict[str, float]:
    window = jax.device_get(state.window)
    return {name: float(window[name] / window["count"]) for name in WINDOW_METRICS}


def _with_empty_window(state: TrainState, target: TrainState) -> TrainState:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target.window)
    return TrainState(**{**vars(state), "window": jax.device_put(empty_window(), shardings)})
