"""Read and write a model as a workdir, a PyTorch file or a safetensors file."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.checkpoint.load import load_step
from mpdit_jax.checkpoint.manager import Checkpoints
from mpdit_jax.checkpoint.workdir import lock_workdir
from mpdit_jax.config.base import ADAPTABLE, base_config, model_config, resolve
from mpdit_jax.convert.checksum import Checksum, checksum
from mpdit_jax.data.info import DatasetInfo, from_json, read_dataset_info, to_json, write_dataset_info
from mpdit_jax.data.latents import PAPER_MEAN, PAPER_STD, LatentSpace, check_normalization, load_latents
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import CheckpointError, ConfigError, InputError, MissingExtraError, WeightsError, install_extra
from mpdit_jax.interop.native_files import PUBLISHED, build_metadata, save_native, stored_step
from mpdit_jax.interop.torch_weights import check_agreement, load_with_metadata, to_torch
from mpdit_jax.io.atomic import atomic_dir, atomic_write, check_writable
from mpdit_jax.io.paths import expand
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import split
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state, create_state, to_items

TORCH_SUFFIXES = (".pt", ".pth")
_RUNTIME_FIELDS = ("dtype", "remat", "attention", "platform")  # fields of a model that do not decide its parameters


@dataclasses.dataclass(frozen=True)
class Found:
    """A model and what its source says of it."""

    model: MPDiT
    step: int  # of training; 1 if the source does not say
    description: str  # of the source
    data: DatasetInfo | None  # class names, and what decoding needs; None if the source does not say


def read(
    source: Path,
    *,
    num_heads: int | None = None,
    convention: str | None = None,
    num_classes: int | None = None,
    key: str | None = None,
    step: int | None = None,
) -> Found:
    """Read the model of a workdir (its moving average), a PyTorch file or a `.safetensors`.

    Args:
        source: the folder or file.
        num_heads, convention, num_classes, key: see `load_torch`; they must agree with what the source records.
        step: checkpoint of a workdir; default the newest undamaged one.

    Raises:
        CheckpointError, WeightsError: nothing readable there.
        InputError: a step of a file, or a key of a workdir.
    """
    if source.is_dir():
        if key is not None:
            raise InputError(f"--key={key}: {source} is a workdir, of which the moving average is converted.")
        at, model = load_step(source, step, ema=True)
        check_agreement(model.config, num_heads, convention, str(source), num_classes)
        data = read_dataset_info(source)
        data = data and dataclasses.replace(data, labels=None)  # a new run may have other examples
        return Found(model, at, f"{source}: moving average of step {at}", data)
    if step is not None:
        raise InputError(f"--step={step}: {source} is no workdir and has no steps.")
    model, metadata = load_with_metadata(source, num_heads, convention, num_classes, key)
    kept = stored_step(metadata)
    kind = f"mpdit_jax, step {'unknown' if kept is None else kept}" if metadata else "published names"
    try:
        data = from_json(metadata["data"]) if "data" in metadata else None
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{source}: the record of its data in its metadata is damaged ({error}).") from error
    return Found(model, kept or 1, f"{source}: {kind}", data)


def check_target(out: Path, config: ConfigDict | None) -> None:
    """Check that `out` can be written without replacing anything.

    Raises:
        CheckpointError: a run is there.
        InputError: a file is there, an unknown ending, no right to write, or a config for a file, which holds none.
    """
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty, and a run is never overwritten: choose another --out.")
    if out.is_file():
        raise InputError(f"{out} exists: choose another --out, or move it away.")
    to_file = out.suffix in (".safetensors", *TORCH_SUFFIXES) and not out.is_dir()
    # A number behind a dot, as in runs/v1.0, is no ending.
    if out.suffix[1:2].isalpha() and not to_file and not out.is_dir():
        raise InputError(
            f"--out={out}: expected .safetensors, .pt or .pth, or a name without an ending for a workdir (or make that "
            "folder first)."
        )
    if to_file and config is not None:
        raise InputError(f"--config is of a run, and --out={out} is a file: leave it out, or write a workdir.")
    check_writable(out / "config.json" if out.is_dir() else out)


def write(out: Path, found: Found, config: ConfigDict | None, expected: Checksum) -> tuple[str, Checksum]:
    """Write the model in the form that `out` names and read it back; return a description and the checksum.

    Args:
        out: as `check_target` allows.
        found: the model.
        config: config of the run, for a workdir.
        expected: the checksum of the model.

    Raises:
        ConfigError: this form cannot hold the model.
        WeightsError: the model that was read back differs; nothing is left at `out`.
    """
    workdir = out.is_dir() or out.suffix not in (".safetensors", *TORCH_SUFFIXES)
    with atomic_dir(out) as place:
        if workdir:
            latents = _write_workdir(place, found, config)
            kind = f"workdir of step {found.step}, parameters and moving average the same, optimizer new{latents}"
        elif out.suffix == ".safetensors":
            save_native(place, found.model, found.step, _data_entry(found))
            kind = f"{_size(place)}, this project's names, the model's config in the metadata"
        else:
            _write_torch(place, found)
            kind = f'{_size(place)}, published names under "ema", the model\'s config under "metadata"'
        after = checksum(read(place).model)
        if after != expected:
            raise WeightsError(f"{out} would be another model than its source ({after} after {expected}): not written.")
    return f"{out}: {kind}", after


def _write_torch(out: Path, found: Found) -> None:
    state = to_torch(found.model)
    try:
        import torch
    except ImportError as error:
        problem = f"{out.name} is a PyTorch file: {install_extra('torch')}, or write .safetensors."
        raise MissingExtraError(problem) from error
    metadata = build_metadata(found.model, found.step) | _data_entry(found) | {"names": PUBLISHED}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    with atomic_write(out) as file:
        try:
            torch.save({"ema": tensors, "metadata": metadata}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, which PyTorch reports in its own words
                raise error.__context__ from error
            raise


def _data_entry(found: Found) -> dict[str, str]:
    return {} if found.data is None else {"data": to_json(found.data)}


def _write_workdir(out: Path, found: Found, config: ConfigDict | None) -> str:
    """Write a workdir; return a note on the normalization of latents where the source does not record it."""
    resolved = resolve(_run_config(found, config))
    data, note = _dataset_info(found, resolved)
    model, theirs = model_config(resolved), vars(found.model.config)
    differing = {
        name: f"config.model.{name}={ours!r} (the file: {theirs[name]!r})"
        for name, ours in vars(model).items()
        if name not in _RUNTIME_FIELDS and ours != theirs[name]
    }
    if differing:
        start = (
            "; to train it from these weights, write --out=weights.safetensors without --config, and train with "
            "--config.init_from=weights.safetensors"
        )
        start = start if {*differing} <= {*ADAPTABLE, "null_class", "guidance_max"} else ""
        hint = "" if model.null_class == theirs["null_class"] else " (config.label_dropout decides null_class)"
        raise ConfigError(f"--config is of another model: {', '.join(differing.values())}{hint}{start}.")
    mesh, optimizer = make_mesh(devices=jax.local_devices()[:1]), make_optimizer(resolved.optimizer)
    state = create_state(model, optimizer, abstract_state(model, optimizer, mesh), resolved.seed)
    parameters = jax.device_put(split(found.model)[1], jax.tree.map(lambda leaf: leaf.sharding, state.parameters))
    state = dataclasses.replace(
        state,
        step=jnp.asarray(found.step, jnp.int32),
        parameters=parameters,
        ema_parameters=jax.tree.map(jnp.copy, parameters),
    )
    with lock_workdir(out, resolved), Checkpoints(out, keep=1) as checkpoints:
        checkpoints.save(found.step, to_items(state), final=True)
        if data is not None:
            write_dataset_info(out, data)
    return note


def _dataset_info(found: Found, config: FrozenConfigDict) -> tuple[DatasetInfo | None, str]:
    """Return what to record of the data, and a note if the latents' normalization is assumed or not known."""
    data = config.data
    if found.data is not None or data.name != "latents":
        return found.data, ""
    if data.path and expand(data.path).is_dir():
        store, space = load_latents(data.path, data.normalization)
        check_normalization(space, (store.manifest.latent_mean, store.manifest.latent_std))
        return DatasetInfo(tuple(store.manifest.class_names), space), f"; latents normalized as in {data.path}"
    if data.normalization in ("manifest", "vae") or config.model.in_channels != len(PAPER_MEAN):
        return None, "; its latents cannot be decoded: their normalization needs the --config.data.path of the latents"
    note = "; latents normalized by the paper's constants, of a VAE that is not recorded"
    return DatasetInfo((), LatentSpace(PAPER_MEAN, PAPER_STD, "")), note


def _run_config(found: Found, config: ConfigDict | None) -> ConfigDict:
    """Return the given config, or the default recipe for the model."""
    model = found.model.config
    if config is not None:
        return config
    if model.convention != "velocity":
        raise ConfigError(
            f"a model with the convention {model.convention!r} cannot be trained here, so it has no workdir: write "
            ".safetensors or .pt, and sample from Python as docs/weights.md shows."
        )
    if model.decoder_depth:
        raise ConfigError(f"model.decoder_depth={model.decoder_depth}: give the --config of its masked training.")
    run = base_config()
    run.model.update(dataclasses.asdict(model))
    if not model.null_class:
        run.label_dropout = 0.0
    if model.in_channels not in (1, 3) or (found.data is not None and found.data.latents is not None):
        run.data.name = "latents"
    return run


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
