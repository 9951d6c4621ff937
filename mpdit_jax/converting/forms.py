"""Reading a model from any of its forms, and writing it in any."""

import dataclasses
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mpdit_jax.checkpoint import Checkpoints, load_checkpoint
from mpdit_jax.config import base_config, model_of, resolve
from mpdit_jax.errors import CheckpointError, ConfigError, InputError, MissingExtraError, WeightsError
from mpdit_jax.files import check_writable, replacing
from mpdit_jax.interop.own_files import own_step, save_own
from mpdit_jax.interop.torch_weights import load_torch, to_torch
from mpdit_jax.mesh import make_mesh
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import split
from mpdit_jax.stored import list_steps
from mpdit_jax.training.optimizer import make_optimizer
from mpdit_jax.training.state import create_state, to_items
from mpdit_jax.workdir import claim_workdir

TORCH_SUFFIXES = (".pt", ".pth")
# How a model is run, which does not change what its parameters are.
_OF_THE_MACHINE = ("dtype", "remat", "attention")


@dataclasses.dataclass(frozen=True)
class Found:
    """A model, the step of training it is from (1 where the file does not say), and what was read."""

    model: MPDiT
    step: int
    description: str


def read(
    source: Path, *, num_heads: int | None = None, convention: str | None = None, step: int | None = None
) -> Found:
    """The model of a workdir (its moving average), a PyTorch file or a `.safetensors`.

    Args:
        source: the folder or file.
        num_heads: as `load_torch`.
        convention: as `load_torch`.
        step: which checkpoint of a workdir; default the newest.

    Raises:
        CheckpointError, WeightsError: nothing there, or nothing that can be read.
    """
    if source.is_dir():
        model = load_checkpoint(source, step, ema=True)
        at = list_steps(source)[-1] if step is None else step
        return Found(model, at, f"{source}: moving average of step {at}")
    if step is not None:
        raise InputError(f"--step={step}: {source} is no workdir and has no steps.")
    model = load_torch(source, num_heads, convention)
    kept = own_step(source)
    kind = "published names" if kept is None else f"mpdit_jax, step {kept}"
    return Found(model, kept or 1, f"{source}: {kind}")


def check_target(out: Path) -> None:
    """Raise unless something can be written to `out` without replacing anything.

    Raises:
        CheckpointError: a run is there.
        InputError: anything else is there, an ending that means nothing, or no right to write.
    """
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty, and a run is never overwritten: choose another --out.")
    if out.is_file():
        raise InputError(f"{out} exists: choose another --out, or move it away.")
    if out.suffix and out.suffix not in (".safetensors", *TORCH_SUFFIXES) and not out.is_dir():
        raise InputError(f"--out={out}: expected .safetensors, .pt or .pth, or a name without an ending for a workdir.")
    check_writable(out / "config.json" if out.is_dir() else out)


def write(out: Path, found: Found, config: ConfigDict | None) -> str:
    """Write the model in the form that `out` names; says what was written.

    Args:
        out: as `check_target` allows.
        found: what to write.
        config: the run's, of a workdir.

    Raises:
        ConfigError: a model that this form cannot hold.
    """
    if out.suffix == ".safetensors":
        save_own(out, found.model, found.step)
        return f"{out}: {_size(out)}, this project's names, the model's config in the metadata"
    if out.suffix in TORCH_SUFFIXES:
        _write_torch(out, found.model)
        return f'{out}: {_size(out)}, published names under "ema"'
    _write_workdir(out, found, config)
    return f"{out}: workdir of step {found.step}, parameters and moving average the same, optimizer new"


def checksum(model: MPDiT) -> str:
    """A forward pass of two fixed examples, one of them of the null class: its size and a digest of its bits."""
    x = jax.random.normal(jax.random.key(0), (2, *model.input_shape))
    # DiT's times are steps; any number is as good for comparing.
    velocity = np.asarray(model(x, jnp.array([0.25, 0.75]), jnp.array([0, model.num_classes])))
    digest = hashlib.sha256(velocity.tobytes()).hexdigest()[:12]
    return f"{digest} (RMS {float(np.sqrt(np.square(velocity).mean())):.6f})"


def _write_torch(out: Path, model: MPDiT) -> None:
    state = to_torch(model)
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            f"{out} is a PyTorch file: install the extra with `pip install 'mpdit_jax[torch]'`, or write .safetensors."
        ) from error
    with replacing(out) as file:
        torch.save({"ema": {name: torch.from_numpy(np.array(array)) for name, array in state.items()}}, file)


def _write_workdir(out: Path, found: Found, config: ConfigDict | None) -> None:
    resolved = resolve(_run_config(found.model.config, config))
    if _parameters_of(model_of(resolved)) != _parameters_of(found.model.config):
        differing = {
            name: (value, vars(found.model.config)[name])
            for name, value in vars(model_of(resolved)).items()
            if name not in _OF_THE_MACHINE and value != vars(found.model.config)[name]
        }
        told = ", ".join(
            f"config.model.{name}={ours!r} (the file: {theirs!r})" for name, (ours, theirs) in differing.items()
        )
        raise ConfigError(f"--config is of another model: {told}.")
    mesh, optimizer = make_mesh(devices=jax.local_devices()[:1]), make_optimizer(resolved.optimizer)
    state = create_state(model_of(resolved), optimizer, mesh, resolved.seed)
    parameters = jax.device_put(split(found.model)[1], jax.tree.map(lambda leaf: leaf.sharding, state.parameters))
    state = dataclasses.replace(
        state,
        step=jnp.asarray(found.step, jnp.int32),
        parameters=parameters,
        ema_parameters=jax.tree.map(jnp.copy, parameters),
    )
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
    try:
        with claim_workdir(temporary, resolved), Checkpoints(temporary, keep=1) as checkpoints:
            checkpoints.save(found.step, to_items(state))
        temporary.chmod(0o755)
        os.replace(temporary, out)  # an empty folder in its place is replaced, one with anything in it is not
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _run_config(model: ModelConfig, config: ConfigDict | None) -> ConfigDict:
    """The config given, or the default recipe with the model's fields."""
    if config is not None:
        return config
    if model.convention != "velocity":
        raise ConfigError(
            f"a model that predicts by the convention {model.convention!r} cannot be trained here, and a workdir is of "
            "a run: write .safetensors or .pt."
        )
    if model.decoder_depth:
        raise ConfigError(f"model.decoder_depth={model.decoder_depth}: give the --config of its masked training.")
    run = base_config()
    run.model.update(dataclasses.asdict(model))
    return run


def _parameters_of(model: ModelConfig) -> ModelConfig:
    return model.replace(**{name: vars(ModelConfig())[name] for name in _OF_THE_MACHINE})


def same_or_raise(before: str, after: str, out: Path) -> None:
    """Raise WeightsError if what was written computes something else."""
    if before != after:
        raise WeightsError(f"{out} computes something else than its source ({after} after {before}): do not use it.")


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
