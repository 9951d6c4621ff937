"""The one module that uses Orbax: it writes and reads checkpoints, and has the barrier that can wait for days."""

import glob
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils.epath.gpath import PosixGPath

from mpdit_jax.errors import InputError

# Orbax has every replica write its part of an array and compiles a program for each part, which is not worth it below
# so many bytes a part.
_SMALLEST_PART = 64 * 1024


class Storage:
    """The checkpoints STEP/ITEM in one folder; the newest are kept, and the last one may still be being written."""

    def __init__(self, folder: Path, keep: int | None, keep_every: int) -> None:
        """Take every folder with a number for a checkpoint, and delete older ones than the newest `keep`.

        Args:
            folder: absolute.
            keep: None for all.
            keep_every: keep those of multiples of this step as well; 0 for none.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_meet),
        )
        self._manager = ocp.CheckpointManager(_LiteralPath(folder), options=options, handler_registry=_handlers())

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints there are."""
        return list(self._manager.all_steps())

    def save(self, step: int, trees: Mapping[str, Any], records: Mapping[str, Any]) -> None:
        """Begin to write pytrees of arrays, and values that JSON can hold, each as an item of its name."""
        items: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        items |= {name: ocp.args.JsonSave(value) for name, value in records.items()}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Return when everything is on disk; raise whatever has kept it from there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and end the threads that write."""
        self._manager.close()


class ItemReader:
    """Reads the items of checkpoints on this process alone; a context manager.

    A barrier would leave the other processes waiting for one that fails.
    """

    def __init__(self) -> None:
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="alone"
        )
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        self._checkpointer = ocp.Checkpointer(handler, multiprocessing_options=alone)

    def __enter__(self) -> "ItemReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._checkpointer.close()

    def restore(self, item: Path, target: Any) -> Any:
        """Return the arrays of an item, of the shapes, dtypes and shardings in `target`."""
        return self._checkpointer.restore(_LiteralPath(item), args=ocp.args.StandardRestore(target))


def wait_at_barrier(place: str, milliseconds: int) -> None:
    """Return when every process of `jax.distributed` has come to `place`, a name that can be used again."""
    ocp.multihost.get_barrier_sync_fn()(key=place, timeout_ms=milliseconds)


class _LiteralPath(PosixGPath):
    """A path whose `glob` takes the path itself literally: in Orbax's calls `[1]` would match `1`."""

    def glob(self, pattern: str) -> Iterator["_LiteralPath"]:
        return map(type(self), glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern)))


def check_storable(folder: Path) -> None:
    """Raise InputError for a backslash in the folder's path: TensorStore would take it for a slash."""
    if "\\" in str(folder.resolve()):
        raise InputError(f"{folder.resolve()}: checkpoints cannot lie below a folder with a backslash in its name.")


def _meet(*, key: str, timeout_ms: int) -> None:
    """Wait at a barrier for the threads of all processes that write.

    Orbax calls it even after a thread failed to write, and the other processes would wait forever. It then raises the
    failure, so that this process ends, and JAX ends the others.
    """
    if jax.process_count() == 1:
        return
    failure = sys.exc_info()[1]
    if failure is not None:
        raise failure
    wait_at_barrier(key, timeout_ms)


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Return the handlers that write a checkpoint's items."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SMALLEST_PART)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(type_handler_registry=types))
    registry.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    return registry
