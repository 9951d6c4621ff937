"""Training a small VAE of Stable Diffusion's family: reconstruction and KL divergence, nothing adversarial."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.checkpoint.workdir import lock_workdir
from mpdit_jax.data.image_sets import open_images
from mpdit_jax.data.picture_sets import Pictures
from mpdit_jax.data.pipeline import batches
from mpdit_jax.distributed.mesh import batch_sharding, check_batch, make_mesh, replicated
from mpdit_jax.errors import DivergedError
from mpdit_jax.io import pictures as images
from mpdit_jax.model.parameters import Parameters, merge, split
from mpdit_jax.train.prefetcher import Prefetcher
from mpdit_jax.train.run import Policy, Run
from mpdit_jax.train.stopwatch import Stopwatch
from mpdit_jax.train.vae_config import autoencoder_config, compare_vae_configs, resolve_vae
from mpdit_jax.vae import Autoencoder, AutoencoderConfig, load_vae, save_folder
from mpdit_jax.vae.autoencoder import mean_and_std
from mpdit_jax.vae.weights import abstract

_SHOWN = 16  # images and their reconstructions in the picture, and images encoded at a time
_THREADS = 2  # that decode image files
_SCALED = 1024  # images that the scaling factor is measured on


class VAEState(NamedTuple):
    """A plain pytree; random keys come from (seed, step)."""

    step: jax.Array
    parameters: Parameters
    optimizer_state: optax.OptState
    metrics: dict[str, jax.Array]  # of the last step, not saved


def train_vae(config: ConfigDict | FrozenConfigDict, workdir: Path) -> int:
    """Train until `config.steps`, or until asked to stop; continue the training that the workdir holds.

    Args:
        config: see `base_vae_config`.
        workdir: gets checkpoints, logs and, at the end, `vae/` (a folder as diffusers writes it) and
            `reconstructions.png` (images above, their reconstructions below).

    Returns:
        The steps that are done and saved: `config.steps`, or fewer if it was asked to stop.

    Raises:
        ConfigError, DataError, InputError: see each class.
        CheckpointError: the workdir holds a VAE of another config, or is being written to.
        DivergedError: the loss or the parameters are not finite.

    Signals are handled as by `mpdit_jax.train`.
    """
    config = resolve_vae(config)
    architecture, mesh = autoencoder_config(config), make_mesh()
    check_batch(config.batch_size, mesh)
    source = dataclasses.replace(
        open_images(config.data.images, config.data.split, classes=False),
        image_size=config.data.image_size,
        channels=architecture.in_channels,
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    create = jax.jit(partial(_initial_state, architecture, optimizer, config.seed), out_shardings=replicated(mesh))

    with jax.set_mesh(mesh), Run(config, workdir, lock_workdir(workdir, config, compare_vae_configs), _POLICY) as run:
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), jax.eval_shape(create)
        )
        step, state = run.restore(target) or (0, create())
        update = _make_update(architecture, optimizer, config)
        data = Prefetcher(
            batches(source, config.batch_size, config.seed, start=step, threads=_THREADS),
            lambda batch: jax.device_put({"x": batch["x"]}, batch_sharding(mesh)),
        )
        run.start(step, Stopwatch(config.batch_size))
        while step < config.steps and not run.should_stop(step):
            batch = run.take(data, step, state)
            with run.dispatch(step):
                state = update(state, batch["x"])
            step += 1
            run.advance(step, state, data)
            state = run.log(step, state)
            run.save(step, state)
        run.save_on_stop(step, state)
        if step == config.steps:
            run.check(step, state)
            _write(workdir, architecture, state.parameters, source)
    return step


def _to_items(state: VAEState) -> dict[str, Any]:
    return {"vae": {name: value for name, value in state._asdict().items() if name != "metrics"}}


def _from_items(items: dict[str, Any]) -> VAEState:
    return VAEState(**items["vae"], metrics=jax.device_put(_no_metrics(), items["vae"]["step"].sharding))


def _metrics(step: int, state: VAEState) -> tuple[dict[str, float], list[int]]:
    _check(step, state)  # a non-finite step is not logged
    return {name: float(value) for name, value in state.metrics.items()}, []


def _check(step: int, state: VAEState, newest: Callable[[], str] | None = None) -> int:
    if not (np.isfinite(float(state.metrics["loss"])) and np.isfinite(float(optax.tree.norm(state.parameters)))):
        raise DivergedError(
            f"the loss or the parameters of step {step} are not finite: start again in a new --workdir with a lower "
            "config.learning_rate."
        )
    return 0


_POLICY = Policy(_to_items, _from_items, _metrics, lambda state: state, _check)


def _initial_state(architecture: AutoencoderConfig, optimizer: optax.GradientTransformation, seed: int) -> VAEState:
    parameters = split(Autoencoder(architecture, rngs=nnx.Rngs(seed)))[1]
    return VAEState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters), _no_metrics())


def _no_metrics() -> dict[str, jax.Array]:
    return {name: jnp.zeros(()) for name in ("loss", "reconstruction", "kl")}


def _make_update(
    architecture: AutoencoderConfig, optimizer: optax.GradientTransformation, config: FrozenConfigDict
) -> Any:
    structure = abstract(architecture)[0]

    def loss(parameters: Parameters, x: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = merge(structure, parameters)
        mean, std = mean_and_std(model.moments(x))
        sample = mean + std * jax.random.normal(key, mean.shape)
        reconstruction = jnp.abs(model.decode(sample) - x).mean()
        # KL divergence of a diagonal Gaussian from N(0, 1), averaged over latent values.
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * jnp.log(std)).mean()
        total = reconstruction + config.kl_weight * kl
        return total, {"loss": total, "reconstruction": reconstruction, "kl": kl}

    def update(state: VAEState, x: jax.Array) -> VAEState:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradients, metrics = jax.grad(loss, has_aux=True)(state.parameters, x, key)
        with jax.numpy_dtype_promotion("standard"):  # Optax takes powers of integers
            updates, optimizer_state = optimizer.update(gradients, state.optimizer_state)
        parameters = optax.apply_updates(state.parameters, updates)
        return VAEState(state.step + 1, parameters, optimizer_state, metrics)

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
