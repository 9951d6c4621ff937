"""Loading of a trained model, and of its run's config, from a workdir."""

import shlex
import warnings
from functools import partial
from pathlib import Path

import jax
from ml_collections import FrozenConfigDict

from mpdit_jax.checkpoint.reader import CHECKPOINTS, list_steps, numbered_folders, read_step
from mpdit_jax.config.base import from_json, model_config
from mpdit_jax.distributed.collectives import broadcast, run_on_process_0
from mpdit_jax.distributed.mesh import make_mesh, replicated
from mpdit_jax.errors import CheckpointError, ConfigError, DamageWarning
from mpdit_jax.io.paths import expand
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import abstract, merge

CONFIG = "config.json"


def run_around(folder: str | Path) -> Path | None:
    """Return the run whose checkpoints a folder lies among; None if it lies elsewhere or is a workdir itself."""
    path = Path(folder).absolute()
    runs = [at.parent for at in (path, *path.parents) if at.name == CHECKPOINTS and not (path / CONFIG).is_file()]
    return next((run for run in runs if (run / CONFIG).is_file() and numbered_folders(run)), None)


def load_config(workdir: str | Path) -> FrozenConfigDict:
    """Load the resolved config stored in a workdir.

    Raises:
        CheckpointError: no run there, or its config cannot be read.
    """
    path = expand(workdir) / CONFIG
    if path.parent.is_file():
        raise CheckpointError(
            f"{workdir} is a file, and a workdir is a folder: `python -m mpdit_jax.convert "
            f"--source={shlex.quote(str(workdir))} --out=FOLDER` makes one of an MPDiT's weights; docs/weights.md "
            "shows how to sample a DiT or SiT."
        )
    if run := run_around(workdir):
        raise CheckpointError(
            f"{workdir} lies among the checkpoints of the run {run}: give that folder as workdir; --step=N chooses a "
            "checkpoint."
        )
    if not path.is_file():
        raise CheckpointError(
            f"{workdir} holds no run ({CONFIG} is missing): train one with "
            f"`python -m mpdit_jax.train --config=digits --workdir={shlex.quote(str(workdir))}`."
        )
    try:
        return from_json(path.read_text())
    except (ConfigError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load_checkpoint(workdir: str | Path, step: int | None = None, ema: bool = True) -> MPDiT:
    """Load a trained model from a workdir, replicated over this process's devices; see `load_step`."""
    return load_step(workdir, step, ema)[1]


def load_together(workdir: str | Path, step: int | None = None, ema: bool = True) -> tuple[int, MPDiT]:
    """Load a model as `load_step` does, on all processes from the newest checkpoint that process 0 finds. Collective.

    A run that is still training may write another checkpoint meanwhile.
    """
    loaded = run_on_process_0(partial(load_step, workdir, step, ema))
    found = broadcast(loaded[0] if loaded is not None else 0)
    return loaded if loaded is not None else load_step(workdir, found, ema)


def load_step(workdir: str | Path, step: int | None = None, ema: bool = True) -> tuple[int, MPDiT]:
    """Load a trained model from a workdir, replicated over this process's devices, and its step.

    Arrays that were put on one of several devices explicitly need
    `jax.device_put(x, jax.sharding.NamedSharding(...))` over all of them before they go into the model.

    Args:
        workdir: the folder given to `train`.
        step: which checkpoint; default the newest that is whole, with a DamageWarning if newer ones are not.
        ema: the moving average of the parameters, from which one samples, or the parameters themselves.

    Raises:
        CheckpointError: no run, no checkpoint, none at `step` (the message lists those there are), or a damaged one.
    """
    workdir = expand(workdir)
    config, steps = load_config(workdir), list_steps(workdir)
    if not steps:
        raise CheckpointError(f"{workdir} has no finished checkpoint yet; train first, or wait for the first one.")
    if step is not None and step not in numbered_folders(workdir):
        raise CheckpointError(f"{workdir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
    structure, shapes = abstract(model_config(config))
    mesh = make_mesh(devices=jax.local_devices())
    everywhere = replicated(mesh)
    target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere) for name, leaf in shapes.items()}
    item = "ema_parameters" if ema else "parameters"
    folder = workdir.resolve() / CHECKPOINTS
    problems = []
    for candidate in sorted(numbered_folders(workdir), reverse=True) if step is None else [step]:
        try:
            with jax.set_mesh(mesh):  # the caller may have set another
                items = read_step(folder / str(candidate), {item: target})
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; step {candidate} is used.", DamageWarning, stacklevel=3)
        return candidate, merge(structure, items[item])
    older = [str(other) for other in steps if other != step]
    raise CheckpointError(f"{problems[0]}: move it away to use another (there are: {', '.join(older) or 'none'}).")
