"""Checkpoints: what a workdir holds, what is saved, restored and refused.

workdir/config.json           the resolved config of the run
workdir/checkpoints/STEP/     parameters, ema_parameters, optimizer and progress, by Orbax
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import FrozenConfigDict

from mpdit_jax.config import differences, from_json, model_of, to_json
from mpdit_jax.errors import CheckpointError, ConfigError
from mpdit_jax.files import check_writable, replacing
from mpdit_jax.mesh import make_mesh, replicated
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import abstract, merge

_CONFIG = "config.json"
_CHECKPOINTS = "checkpoints"


class Checkpoints:
    """The checkpoints of one workdir, written in the background; a context manager that waits for the last one."""

    def __init__(self, workdir: Path, keep: int, keep_every: int = 0) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(workdir.resolve() / _CHECKPOINTS, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Save pytrees by name, in the background; a step that is there already is left alone."""
        if step not in self._manager.all_steps():
            saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
            self._manager.save(step, args=ocp.args.Composite(**saved), force=True)

    def restore(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """The pytrees saved at `step`, laid out as `targets` (shapes with shardings) says."""
        wanted = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        return dict(self._manager.restore(step, args=ocp.args.Composite(**wanted)))


def claim_workdir(workdir: Path, config: FrozenConfigDict) -> None:
    """Store `config` in the workdir, or check that it continues what is stored there.

    Raises:
        CheckpointError: the workdir holds a run of another config (the differences are shown), or checkpoints
            without a config.
        InputError: the workdir cannot be written.
    """
    check_writable(workdir / _CONFIG)
    if (workdir / _CONFIG).exists():
        changed = differences(load_config(workdir), config)
        if changed:
            lines = [f"  config.{path}: {old!r} in the run, {new!r} now" for path, (old, new) in changed.items()]
            raise CheckpointError(
                f"{workdir} holds a run of another config:\n"
                + "\n".join(lines)
                + "\nUse another --workdir for a new run, or leave these fields as they were to continue this one."
            )
    elif list_steps(workdir):
        raise CheckpointError(f"{workdir} has checkpoints but no {_CONFIG}; restore that file or use another workdir.")
    with replacing(workdir / _CONFIG) as file:
        file.write(to_json(config).encode())


def load_config(workdir: str | Path) -> FrozenConfigDict:
    """The resolved config stored in a workdir.

    Raises:
        CheckpointError: no run there, or its config cannot be read.
    """
    path = Path(workdir) / _CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{workdir} holds no run ({_CONFIG} is missing): train one with "
            f"`python -m mpdit_jax.train --config=configs/digits.py --workdir={workdir}`."
        )
    try:
        return from_json(path.read_text())
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load_checkpoint(workdir: str | Path, step: int | None = None, ema: bool = True) -> MPDiT:
    """A trained model from a workdir, replicated over this process's devices.

    Args:
        workdir: the folder given to `train`.
        step: which checkpoint; default the newest.
        ema: the moving average of the parameters (what one samples from), or the parameters themselves.

    Raises:
        CheckpointError: no run, no checkpoint, or none at `step` (the message lists those there are).
    """
    config, steps = load_config(workdir), list_steps(workdir)
    if not steps:
        raise CheckpointError(f"{workdir} has no finished checkpoint yet; train first, or wait for the first one.")
    if step is not None and step not in steps:
        raise CheckpointError(f"{workdir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
    structure, shapes = abstract(model_of(config))
    everywhere = replicated(make_mesh(devices=jax.local_devices()))
    target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere) for name, leaf in shapes.items()}
    item = "ema_parameters" if ema else "parameters"
    path = Path(workdir).resolve() / _CHECKPOINTS / str(steps[-1] if step is None else step) / item
    with ocp.StandardCheckpointer() as checkpointer:
        return merge(structure, checkpointer.restore(path, target))


def list_steps(workdir: str | Path) -> list[int]:
    """Steps of the finished checkpoints in a workdir, ascending."""
    folder = Path(workdir) / _CHECKPOINTS
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
