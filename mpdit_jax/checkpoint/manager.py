"""The checkpoints of a run: saving, restoring, and setting damaged ones aside.

workdir/config.json               the resolved config of the run
workdir/.saved                    marks that there has been a checkpoint
workdir/checkpoints/STEP/         parameters, ema_parameters, optimizer and progress, by Orbax, and their digests
workdir/damaged_checkpoints/STEP/ checkpoints that could not be read
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax

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
from mpdit_jax.io.storage import Storage

SAVED = ".saved"
DAMAGED = "damaged_checkpoints"
T = TypeVar("T")


class Restored(NamedTuple):
    """The checkpoint that a run continues from."""

    step: int
    items: dict[str, Any]
    notes: list[str]  # a sentence for each checkpoint that was moved aside; empty on other processes than 0


class Checkpoints:
    """The checkpoints of one workdir, written in the background.

    A context manager, which waits for the last save and reads part of it back.
    """

    def __init__(self, workdir: Path, keep: int, keep_every: int = 0) -> None:
        self._workdir, self._folder = workdir, workdir.resolve() / CHECKPOINTS
        self._keep: int | None = keep
        self._keep_every = keep_every
        self._last: tuple[int, dict[str, Any]] = 0, {}  # step of the last save, shapes of its items to be read back

    @cached_property
    def _storage(self) -> Storage:
        return Storage(self._folder, self._keep, self._keep_every)  # on first use: opening it may delete checkpoints

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "_storage" in vars(self):
            try:
                self._guarded(self._storage.wait)
                self._guarded(self._mark_saved)
                if kind is None:
                    self._read_back()
            finally:
                self._guarded(self._storage.close)

    def latest_step(self) -> int | None:
        """Return the step of the newest finished checkpoint."""
        return max(list_steps(self._workdir), default=None)

    def save(self, step: int, items: Mapping[str, Any], *, keep_older: bool = False, final: bool = False) -> None:
        """Save pytrees with their digests in the background, unless there is a checkpoint of that step already.

        When the last save is done, all its items but the largest are read back if it is `final`: the optimizer's state
        may find no room beside what is still in memory. Otherwise only the smallest is, as there may be little time.

        Args:
            step: the run's step.
            items: the pytrees, by name.
            keep_older: delete no older checkpoint from now on.
            final: whether these are the results of a run that is done.

        Raises:
            CheckpointError: this one or the one before it could not be written, as when the disk is full.
        """
        if keep_older and self._keep is not None:
            self._guarded(self._storage.wait)
            self._storage.close()
            del self._storage
            self._keep = None
        self._guarded(self._mark_saved)
        if self._guarded(lambda: step in self._storage.steps()):
            return
        digests = {name: integrity.digests(tree) for name, tree in items.items()}
        record = {"version": DIGESTS_VERSION, "step": step, "items": digests}
        self._guarded(partial(self._storage.save, step, items, {DIGESTS: record}))
        names = sorted(items, key=lambda name: sum(leaf.nbytes for leaf in jax.tree.leaves(items[name])))
        names = names[: max(len(names) - 1, 1)] if final else names[:1]
        self._last = step, {name: jax.tree.map(_like, items[name]) for name in names}

    def _read_back(self) -> None:
        """Read from the last save what `save` says, one item at a time. Collective.

        Raises:
            CheckpointError: it cannot be read, or differs from what was saved.
        """
        step, targets = self._last
        try:
            for name, target in targets.items():
                read_together(self._folder / str(step), {name: target})
        except CheckpointError as error:
            raise CheckpointError(f"{error}, though nothing failed when it was written: use another disk.") from error

    def _mark_saved(self) -> None:
        """Leave a file that tells a run whose checkpoints were lost from one that never had any."""
        if jax.process_index() == 0 and not (self._workdir / SAVED).exists() and list_steps(self._workdir):
            (self._workdir / SAVED).touch()

    def wait(self) -> None:
        """Return when everything is on disk; raise CheckpointError if it could not be written."""
        if "_storage" in vars(self):
            self._guarded(self._storage.wait)

    def restore_newest(self, targets: Mapping[str, Any]) -> Restored | None:
        """Restore the newest undamaged checkpoint; return None if there are no checkpoints at all. Collective.

        Newer damaged checkpoints are then moved aside; nothing is deleted.

        Raises:
            UnavailableError: a checkpoint that may be undamaged cannot be read now.
            CheckpointError: all checkpoints are damaged.
        """
        problems: dict[int, str] = {}
        for step in self._seen_by_all():
            try:
                items = read_together(self._folder / str(step), targets)
            except UnavailableError as error:
                raise UnavailableError(
                    f"{error}, which need not be damage, and nothing was moved: make it readable, or move the folder "
                    "away to continue from the checkpoint before it."
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
        """Yield the steps of process 0's checkpoint folders, newest first, once every process has seen the folder.

        Raises:
            ProcessError: a process does not see one of them.
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
        """Move damaged and incomplete checkpoints aside, and return a sentence for each. On process 0."""
        # Incomplete older ones too: Orbax would count them as checkpoints, and later delete them.
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
        """Run an action of `Storage`; raise CheckpointError if it fails."""
        try:
            return action()
        except Exception as error:  # Orbax raises many classes of errors when a disk fails
            if jax.process_count() > 1 and not isinstance(error, OSError | ValueError):
                raise  # perhaps a process was lost
            kept = self.latest_step()
            newest = "no checkpoint is there yet" if kept is None else f"the newest checkpoint is of step {kept}"
            raise CheckpointError(
                f"a checkpoint cannot be written to {self._folder} ({reason(error)}), and {newest}: make room "
                "and repeat the command."
            ) from error


def _like(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
