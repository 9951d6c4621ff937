"""The training run, top to bottom."""

import math
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
from mpdit_jax.training.optimizer import make_optimizer, make_schedule
from mpdit_jax.training.state import TrainState, abstract_state, create_state, from_items, to_items
from mpdit_jax.training.step import jit_step, make_draw, make_loss, make_step
from mpdit_jax.training.window import empty_window, window_means


def train(config: ConfigDict | FrozenConfigDict, workdir: str | Path) -> TrainState:
    """Train until `config.steps`, or until asked to stop; continue what the workdir holds.

    Args:
        config: an experiment's config, see `mpdit_jax.config.base_config`.
        workdir: where config, checkpoints, metrics, TensorBoard logs and sample grids go.

    Returns:
        The last state, which is also saved.

    Raises:
        ConfigError, DataError, CheckpointError, InputError: see each class; raised before anything is overwritten.
        DivergedError: too many steps in a row had to be left out.
    """
    workdir, config = Path(workdir), resolve(config)
    model_config = model_of(config)
    mesh = make_mesh(**config.mesh)
    check_batch(config.batch_size // config.gradient_accumulation, mesh)
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
        plain_step = make_step(
            make_draw(config),
            make_loss(structure),
            optimizer,
            config.ema_decay,
            accumulation=config.gradient_accumulation,
            spike_factor=config.skip.spike_factor,
        )
        update = jit_step(plain_step, target, mesh)
        learning_rate = make_schedule(config.optimizer)
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
                    checkpoints.save(step, to_items(state))
                    raise
                on_devices = jax.device_put(batch, batch_sharding(mesh))
                with jax.transfer_guard("disallow"):
                    state = update(state, on_devices)
                step += 1
                last = step == config.steps
                progress.advance(step)
                if step % config.log.every == 0 or last:
                    metrics = window_means(jax.device_get(state.window))
                    metrics["learning_rate"] = float(learning_rate(state.guard["accepted"]))
                    state = _with_empty_window(state, target)
                    metrics_file.write(step, metrics)
                    rate = {"images_per_second": progress.images_per_second(step)}
                    tensorboard.scalars(step, metrics | rate)
                    progress.logged(step, metrics.get("loss", math.nan))
                    if metrics["skipped"]:
                        progress.say(f"step {step}: {metrics['skipped']:.0f} steps since the last line were left out")
                    _check_skips(checkpoints, step, state, config.skip.abort_after)
                if step % config.checkpoint.every == 0 or last:
                    # While steps are left out, what broke them may be in the parameters: older states are good.
                    skipped = _check_skips(checkpoints, step, state, config.skip.abort_after)
                    if last or not skipped:
                        checkpoints.save(step, to_items(state))
                if config.sample.every and (step % config.sample.every == 0 or last):
                    picture = draw_grid(config, structure, state)
                    if picture is not None:
                        images.save_png(workdir / "samples" / f"{step:08d}.png", picture)
                        tensorboard.image(step, "samples", picture)
            if stop.name is not None:
                progress.say(f"{stop.name}: saving step {step}")
                _check_skips(checkpoints, step, state, config.skip.abort_after)
                checkpoints.save(step, to_items(state))
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


def _check_skips(checkpoints: Checkpoints, step: int, state: TrainState, abort_after: int) -> int:
    """How many of the newest steps were left out; DivergedError from `abort_after` on."""
    skipped = int(jax.device_get(state.guard["skipped_in_a_row"]))
    if skipped >= abort_after:
        kept = checkpoints.latest_step()
        newest = "no step" if kept is None else f"step {kept}"
        raise DivergedError(
            f"the last {skipped} steps up to {step} were left out, since loss, gradient or update was not finite "
            f"or spiked, and the newest checkpoint is of {newest}: look for broken data, or start again in a new "
            "--workdir with a lower config.optimizer.learning_rate."
        )
    return skipped


def _with_empty_window(state: TrainState, target: TrainState) -> TrainState:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target.window)
    return TrainState(**{**vars(state), "window": jax.device_put(empty_window(), shardings)})
