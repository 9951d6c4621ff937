"""Training a small VAE of Stable Diffusion's family: reconstruction and KL divergence, nothing adversarial."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.checkpoint.manager import Checkpoints
from mpdit_jax.checkpoint.reader import newest_in_words
from mpdit_jax.checkpoint.workdir import lock_workdir
from mpdit_jax.data.image_sets import Pictures, open_images
from mpdit_jax.data.pipeline import batches
from mpdit_jax.distributed.mesh import batch_sharding, check_batch, make_mesh, replicated
from mpdit_jax.errors import DivergedError
from mpdit_jax.io import pictures as images
from mpdit_jax.runtime.signals import PreemptionHandler
from mpdit_jax.train.logger import RunLogger
from mpdit_jax.train.stopwatch import Stopwatch
from mpdit_jax.train.vae_config import autoencoder_config, compare_vae_configs, resolve_vae
from mpdit_jax.vae import Autoencoder, AutoencoderConfig, load_vae, save_folder
from mpdit_jax.vae.autoencoder import mean_and_std
from mpdit_jax.vae.weights import Parameters, abstract, merge, split

_SHOWN = 16  # images and their reconstructions in the picture, and images encoded at a time
_THREADS = 2  # that decode image files
_SCALED = 1024  # images that the scaling factor is measured on


class VAEState(NamedTuple):
    """A plain pytree; what is random comes from (seed, step)."""

    step: jax.Array
    parameters: Parameters
    optimizer_state: optax.OptState


def train_vae(config: ConfigDict | FrozenConfigDict, workdir: Path) -> int:
    """Train until `config.steps`, or until asked to stop; continue what the workdir holds.

    Args:
        config: see `base_vae_config`.
        workdir: gets checkpoints, logs and, at the end, `vae/` (a folder as diffusers writes it) and
            `reconstructions.png` (images above, what the VAE makes of them below).

    Returns:
        The steps that are done and saved: `config.steps`, or fewer if it was asked to stop.

    Raises:
        ConfigError, DataError, InputError: see each class.
        CheckpointError: the workdir holds a VAE of another config, or is being written to.
        DivergedError: the loss is not finite.

    SIGTERM and SIGINT are heeded as by `mpdit_jax.train.loop.train`.
    """
    config = resolve_vae(config)
    architecture, mesh = autoencoder_config(config), make_mesh()
    check_batch(config.batch_size, mesh)
    source = dataclasses.replace(
        open_images(config.data.images, config.data.split, classes=False),
        image_size=config.data.image_size,
        channels=architecture.in_channels,
    )
    with (
        jax.set_mesh(mesh),
        PreemptionHandler(config.checkpoint.grace, partial(newest_in_words, workdir)) as stop,
        lock_workdir(workdir, config, compare_vae_configs) as lock,
        Checkpoints(workdir, keep=2) as checkpoints,
    ):
        if lock.note:
            print(f"{lock.note}.", flush=True)
        stop.nothing_to_save = True
        optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
        create = partial(_initial_state, architecture, optimizer, config.seed)
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), jax.eval_shape(create)
        )
        restored = checkpoints.restore_newest({"vae": target._asdict()})
        if restored is not None:
            for note in restored.notes:
                print(f"{note}.", flush=True)
            step, state = restored.step, VAEState(**restored.items["vae"])
        else:
            step, state = 0, jax.jit(create, out_shardings=replicated(mesh))()
        update = _make_update(architecture, optimizer, config)
        metrics: dict[str, jax.Array] | None = None
        data = batches(source, config.batch_size, config.seed, start=step, threads=_THREADS)
        with (
            Stopwatch(config.batch_size) as watch,
            RunLogger(workdir, step, config.steps, config.batch_size) as report,
        ):
            while step < config.steps and stop.name is None:
                with watch.of("data_wait"):
                    batch = jax.device_put(next(data)["x"], batch_sharding(mesh))
                state, metrics = update(state, batch)
                stop.nothing_to_save = False
                step += 1
                watch.step(metrics)
                report.advance(step)
                last = step == config.steps
                logs, saves = (step % every == 0 or last for every in (config.log.every, config.checkpoint.every))
                if logs or saves:
                    lock.check()
                    values = _finite(step, metrics, state.parameters)
                if logs:
                    report.metrics(step, values, watch.lap())
                if saves:
                    checkpoints.save(step, {"vae": state._asdict()})
            if 0 < step < config.steps:
                stop.begin_grace()
                report.say(f"{stop.name}: saving step {step}")
                lock.check()
                if metrics is not None:
                    _finite(step, metrics, state.parameters)
                checkpoints.save(step, {"vae": state._asdict()})
        if step == config.steps:
            lock.check()
            _write(workdir, architecture, state.parameters, source)
    return step


def _finite(step: int, metrics: dict[str, jax.Array], parameters: Parameters) -> dict[str, float]:
    """The metrics of a step, which with its parameters are finite: nothing else is logged or saved."""
    values = {name: float(value) for name, value in metrics.items()}
    if not (np.isfinite(values["loss"]) and np.isfinite(float(optax.tree.norm(parameters)))):
        raise DivergedError(
            f"the loss or the parameters of step {step} are not finite: start again in a new --workdir with a lower "
            "config.learning_rate."
        )
    return values


def _initial_state(architecture: AutoencoderConfig, optimizer: optax.GradientTransformation, seed: int) -> VAEState:
    parameters = split(Autoencoder(architecture, rngs=nnx.Rngs(seed)))[1]
    return VAEState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))


def _make_update(
    architecture: AutoencoderConfig, optimizer: optax.GradientTransformation, config: FrozenConfigDict
) -> Any:
    structure = abstract(architecture)[0]

    def loss(parameters: Parameters, x: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = merge(structure, parameters)
        mean, std = mean_and_std(model.moments(x))
        sample = mean + std * jax.random.normal(key, mean.shape)
        reconstruction = jnp.abs(model.decode(sample) - x).mean()
        # Of a diagonal Gaussian from the standard normal, a latent value.
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * jnp.log(std)).mean()
        total = reconstruction + config.kl_weight * kl
        return total, {"loss": total, "reconstruction": reconstruction, "kl": kl}

    def update(state: VAEState, x: jax.Array) -> tuple[VAEState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradients, metrics = jax.grad(loss, has_aux=True)(state.parameters, x, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state)
        parameters = optax.apply_updates(state.parameters, updates)
        return VAEState(state.step + 1, parameters, optimizer_state), metrics

    return jax.jit(update, donate_argnums=0)


def _write(workdir: Path, architecture: AutoencoderConfig, parameters: Parameters, source: Pictures) -> None:
    folder = workdir / "vae"
    save_folder(folder, architecture, parameters)
    x = source.batch(np.linspace(0, len(source) - 1, min(_SCALED, len(source))).astype(int))["x"]
    vae = load_vae(folder)
    moments = [vae.encode(part) for part in np.split(x, range(_SHOWN, len(x), _SHOWN))]
    mean, std = (np.concatenate([np.asarray(pair[moment]) for pair in moments]) for moment in (0, 1))
    spread = float(np.sqrt((mean**2 + std**2).mean() - mean.mean() ** 2))
    save_folder(folder, dataclasses.replace(architecture, scaling_factor=1 / spread), parameters)
    chosen = slice(0, None, max(1, len(x) // _SHOWN))
    again = np.asarray(vae.decode(mean[chosen]))
    rows = np.concatenate([x[chosen][:_SHOWN], again[:_SHOWN]])
    images.save_png(workdir / "reconstructions.png", images.grid(images.to_uint8(rows), len(rows) // 2))
