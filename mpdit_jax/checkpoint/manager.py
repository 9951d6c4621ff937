"""The checkpoints of a run: saving, restoring, and setting damaged ones aside.

workdir/config.json               the resolved config of the run
workdir/.saved                    marks that there has been a checkpoint
workdir/checkpoints/STEP/         parameters, ema_parameters, optimizer and progress, by Orbax, and their digests
workdir/damaged_checkpoints/STEP/ checkpoints that could not be read
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from mpdit_jax.checkpoint import digests as integrity
from mpdit_jax.checkpoint.reader import (
    CHECKPOINTS,
    DIGESTS,
    DIGESTS_VERSION,
    incomplete,
    list_steps,
    numbered_folders,
    read_together,
)
from mpdit_jax.distributed.collectives import broadcast, first_sentence, run_on_process_0
from mpdit_jax.errors import CheckpointError, ProcessError, UnavailableError
from mpdit_jax.io.paths import reason

SAVED = ".saved"
DAMAGED = "damaged_checkpoints"
# Orbax has every replica write its part of an array and compiles a program for each part, which is not worth it below
# so many bytes a part.
_SMALLEST_PART = 64 * 1024
T = TypeVar("T")


class Restored(NamedTuple):
    """The checkpoint that a run continues from."""

    step: int
    items: dict[str, Any]
    notes: list[str]  # a sentence for each checkpoint that was moved aside; on process 0 only


class Checkpoints:
    """The checkpoints of one workdir, written in the background; a context manager that waits for the last one."""

    def __init__(self, workdir: Path, keep: int, keep_every: int = 0) -> None:
        self._workdir, self._folder = workdir, workdir.resolve() / CHECKPOINTS
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_meet),
        )

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Made when first needed: it takes every folder with a number for a checkpoint, and deletes old ones.
        return ocp.CheckpointManager(self._folder, options=self._options, handler_registry=_handlers())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "_manager" in vars(self):
            try:
                self._guarded(self._manager.wait_until_finished)
                self._guarded(self._mark_saved)
            finally:
                self._guarded(self._manager.close)

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return max(list_steps(self._workdir), default=None)

    def save(self, step: int, items: Mapping[str, Any], *, keep_older: bool = False) -> None:
        """Save pytrees with their digests in the background, unless there is a checkpoint of that step already.

        Args:
            step: of the run.
            items: the pytrees, by name.
            keep_older: keep all older checkpoints, however many there are.

        Raises:
            CheckpointError: this one or the one before it could not be written, as when the disk is full.
        """
        if keep_older and self._options.max_to_keep is not None:
            self._guarded(self._manager.wait_until_finished)
            self._manager.close()
            del self._manager
            self._options = dataclasses.replace(self._options, max_to_keep=None)
        self._guarded(self._mark_saved)
        if self._guarded(lambda: step in self._manager.all_steps()):
            return
        saved: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        record = {name: integrity.digests(tree) for name, tree in items.items()}
        saved[DIGESTS] = ocp.args.JsonSave({"version": DIGESTS_VERSION, "step": step, "items": record})
        self._guarded(partial(self._manager.save, step, args=ocp.args.Composite(**saved), force=True))

    def _mark_saved(self) -> None:
        """Leave a file that tells a run that lost its checkpoints from one that never had any."""
        if jax.process_index() == 0 and not (self._workdir / SAVED).exists() and list_steps(self._workdir):
            (self._workdir / SAVED).touch()

    def wait(self) -> None:
        """Return when everything is on disk; raise CheckpointError if it could not be written."""
        if "_manager" in vars(self):
            self._guarded(self._manager.wait_until_finished)

    def restore_newest(self, targets: Mapping[str, Any]) -> Restored | None:
        """Restore the newest whole checkpoint; None if there is none of any kind. Collective.

        If a whole one is found, damaged ones are moved aside; nothing is deleted.

        Raises:
            UnavailableError: the newest one that may be whole cannot be read now.
            CheckpointError: there are checkpoints, and none is whole.
        """
        problems: dict[int, str] = {}
        for step in self._seen_by_all():
            try:
                items = read_together(self._folder / str(step), targets)
            except UnavailableError as error:
                raise UnavailableError(
                    f"{error}, which need not be damage, and nothing was moved: mend that, or move the folder away to "
                    "continue from the checkpoint before it."
                ) from error
            except CheckpointError as error:
                problems[step] = str(error)
                continue
            return Restored(step, items, run_on_process_0(partial(self._set_aside, step, problems)) or [])
        if problems:
            newest = max(problems)
            others = f", and neither can the other {len(problems) - 1}" if len(problems) > 1 else ""
            raise CheckpointError(
                f"{problems[newest]}{others}: restore one from a copy, or move {self._folder} away to begin again."
            )
        return None

    def _seen_by_all(self) -> Iterator[int]:
        """Steps of the folders that process 0 sees with the name of a checkpoint, from the newest down.

        Raises:
            ProcessError: another process does not see one of them.
        """
        step = 2**31 - 1
        while True:
            step = broadcast(max((one for one in numbered_folders(self._workdir) if one < step), default=-1))
            if step < 0:
                return
            folder = self._folder / str(step)
            missing = "" if folder.is_dir() else f"process {jax.process_index()} does not see {folder}"
            if problem := first_sentence(missing, "the checkpoint is there"):
                raise ProcessError(f"{problem}: give all machines a --workdir on a file system that they share.")
            yield step

    def _set_aside(self, used: int, problems: Mapping[int, str]) -> list[str]:
        """Move aside every folder that has the name of a checkpoint and is none; a sentence each. On process 0."""
        # Orbax would count older ones, and delete them in their turn.
        older = sorted(numbered_folders(self._workdir) - {*list_steps(self._workdir), *problems})
        every = {**problems, **{step: incomplete(self._folder / str(step)) for step in older}}
        return [
            f"{problem}; it is now in {self._move(step)}" + (f", and step {used} is used" * (step > used))
            for step, problem in every.items()
        ]

    def _move(self, step: int) -> Path:
        folder, count = self._workdir / DAMAGED, 1
        folder.mkdir(exist_ok=True)
        place = folder / str(step)
        while place.exists():
            count += 1
            place = folder / f"{step}-{count}"
        return (self._folder / str(step)).rename(place)

    def _guarded(self, action: Callable[[], T]) -> T:
        """Run an action of the storage layer; its errors become a sentence."""
        try:
            return action()
        except Exception as error:  # how a disk fails is up to the storage layer
            if jax.process_count() > 1 and not isinstance(error, OSError | ValueError):
                raise  # a lost process looks like this too
            kept = self.latest_step()
            newest = "no checkpoint is there yet" if kept is None else f"the newest checkpoint is of step {kept}"
            raise CheckpointError(
                f"a checkpoint cannot be written to {self._folder} ({reason(error)}), and {newest}: make room "
                "and repeat the command."
            ) from error


def _meet(*, key: str, timeout_ms: int) -> None:
    """The barrier of the threads that write.

    Orbax lets a thread that failed wait here too, while the others wait elsewhere for what it did not write. It raises
    its failure instead, which ends its process, and then the others.
    """
    if jax.process_count() == 1:
        return
    failure = sys.exc_info()[1]
    if failure is not None:
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """The handlers that write a checkpoint's items."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SMALLEST_PART)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(type_handler_registry=types))
    registry.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    return registry
