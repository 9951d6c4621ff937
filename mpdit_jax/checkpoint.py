"""Checkpoints: what a workdir holds, what is saved, restored and refused.

workdir/config.json           the resolved config of the run
workdir/checkpoints/STEP/     parameters, ema_parameters, optimizer and progress, by Orbax
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import jax
import orbax.checkpoint as ocp
from ml_collections import FrozenConfigDict

from mpdit_jax.config import differences, from_json, model_of, to_json
from mpdit_jax.errors import CheckpointError, ConfigError
from mpdit_jax.files import check_place, check_writable, replacing, take_lock
from mpdit_jax.mesh import make_mesh, replicated
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import abstract, merge
from mpdit_jax.processes import first_does

_CONFIG = "config.json"
_LOCK = ".lock"
_CHECKPOINTS = "checkpoints"
_FOLDERS, _FILES = (_CHECKPOINTS, "samples", "tensorboard"), ("metrics.jsonl",)


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
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**wanted)))
        except Exception as error:  # what damage looks like is up to the storage layer
            raise _damaged(step, self._manager.directory, list(self._manager.all_steps()), error) from error


@contextmanager
def claim_workdir(workdir: Path, config: FrozenConfigDict) -> Iterator[None]:
    """Hold the workdir for one run: store `config` there, or check that it continues what is stored.

    Raises:
        CheckpointError: another run is writing here, the workdir holds a run of another config (the differences are
            shown), or checkpoints without a config.
        InputError: the workdir cannot be written, or a file is where a folder is to go.
    """
    lock = first_does(lambda: _claim(workdir, config))
    try:
        yield
    finally:
        if lock is not None:
            lock.close()  # the system lets go of it as well when the process ends


def _claim(workdir: Path, config: FrozenConfigDict) -> IO[str]:
    """Take the lock, then store the config; the open file is the lock."""
    check_writable(workdir / _CONFIG)
    for name in (*_FOLDERS, *_FILES):
        check_place(workdir / name, folder=name in _FOLDERS)
    lock = take_lock(workdir / _LOCK)
    if lock is None:
        raise CheckpointError(
            f"another training is writing to {workdir}: wait for it to end, or use another --workdir."
        )
    try:
        _claim_config(workdir, config)
    except BaseException:
        lock.close()
        raise
    return lock


def _claim_config(workdir: Path, config: FrozenConfigDict) -> None:
    steps = list_steps(workdir)
    if not steps:
        pass  # nothing has been trained that another config could contradict
    elif (workdir / _CONFIG).exists():
        changed = differences(load_config(workdir), config)
        if changed:
            lines = [f"  config.{path}: {old!r} in the run, {new!r} now" for path, (old, new) in changed.items()]
            raise CheckpointError(
                f"{workdir} holds a run of another config:\n"
                + "\n".join(lines)
                + "\nUse another --workdir for a new run, or leave these fields as they were to continue this one."
            )
    else:
        raise CheckpointError(f"{workdir} has checkpoints but no {_CONFIG}; restore that file or use another workdir.")
    if steps and max(steps) >= config.steps:
        return  # the run is done already: what is stored says how far it went
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

    Arrays that JAX has not been told to put on one device go with it as they are; with several devices, those that
    have been need `jax.device_put(x, jax.sharding.NamedSharding(...))` over all of them first.

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
        try:
            return merge(structure, checkpointer.restore(path, target))
        except Exception as error:  # what damage looks like is up to the storage layer
            raise _damaged(int(path.parent.name), path.parent.parent, steps, error) from error


def _damaged(step: int, folder: Path, steps: list[int], error: Exception) -> CheckpointError:
    older = ", ".join(str(other) for other in sorted(steps) if other != step) or "none"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(
        f"the checkpoint {folder}/{step} cannot be read ({reason[:200]}): "
        f"move it away to use another (there are: {older})."
    )


def list_steps(workdir: str | Path) -> list[int]:
    """Steps of the finished checkpoints in a workdir, ascending."""
    folder = Path(workdir) / _CHECKPOINTS
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
