"""A checkpoint on disk: which folders are one, and reading one so that damage is noticed."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mpdit_jax.checkpoint import digests as integrity
from mpdit_jax.distributed.collectives import first_sentence
from mpdit_jax.errors import CheckpointError, UnavailableError
from mpdit_jax.io.files import parse_json, reason

CHECKPOINTS = "checkpoints"
DIGESTS, DIGESTS_VERSION = "integrity", 1  # an item of its own
_DIGESTS_FILE = "metadata"  # that Orbax keeps an item of JSON in
# What a system says that cannot read now what may be sound: not permitted, gone for now, too many files, no memory.
_PASSING = (
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
_EXTENSIBLE = "progress"  # the item that later versions may add scalars to; those that a checkpoint lacks are zero


def list_steps(workdir: str | Path) -> list[int]:
    """Steps of the finished checkpoints in a workdir, ascending; other folders with a number are not counted."""
    folder = Path(workdir) / CHECKPOINTS
    return sorted(step for step in numbered_folders(workdir) if is_complete(folder / str(step)))


def newest_in_words(workdir: str | Path) -> str:
    """What of a run is safe on disk, as in "the checkpoint of step 300"."""
    steps = list_steps(workdir)
    return f"the checkpoint of step {steps[-1]}" if steps else "no checkpoint yet"


def numbered_folders(workdir: str | Path) -> set[int]:
    """Steps of everything that has the name of a checkpoint, damaged ones included."""
    folder = Path(workdir) / CHECKPOINTS
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return {int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name))}


def is_complete(folder: Path) -> bool:
    """Whether every part is there that Orbax has noted down."""
    try:
        return _has_its_parts(folder)
    except OSError:
        return False


def _has_its_parts(folder: Path) -> bool:
    try:
        parts = parse_json((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
        return bool(parts) and all(
            (folder / part / (_DIGESTS_FILE if part == DIGESTS else "_METADATA")).is_file() for part in parts
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def incomplete(folder: Path) -> str:
    """The sentence about a checkpoint that lacks a part."""
    return f"the checkpoint {folder} is incomplete"


def read_together(folder: Path, targets: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """As `read_step`, by all processes together: it fails on all of them if it fails on one.

    Raises:
        UnavailableError: it cannot be read now, which says nothing about what is there.
        CheckpointError: it cannot be read, or is not what was saved.
    """
    problem = refused = ""
    try:
        items, notes, record = _restored(folder, targets)
    except CheckpointError as error:
        problem = str(error)
        refused = problem if isinstance(error, UnavailableError) else ""
    problem = first_sentence(problem, "the checkpoint is read")
    if problem:
        refused = first_sentence(refused, "whether it is damaged")
        raise UnavailableError(refused) if refused else CheckpointError(problem)
    _verify(folder, items, record)
    return items, notes


def read_step(folder: Path, targets: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The items of one checkpoint, compared with their digests, and sentences about what is unusual."""
    items, notes, record = _restored(folder, targets)
    _verify(folder, items, record)
    return items, notes


def _restored(folder: Path, targets: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], dict[str, Any] | None]:
    """Items, notes, and the digests they should have; not compared yet."""
    try:
        complete = _has_its_parts(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not complete:
        raise CheckpointError(incomplete(folder))
    # Each process reads for itself: a barrier would leave the others waiting for one that fails.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="alone"
    )
    try:
        record = _recorded(folder)
        items = {}
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            for name, target in targets.items():
                stored = handler.metadata(folder / name).tree if name == _EXTENSIBLE else target
                wanted = ocp.args.StandardRestore(_only(target, stored))
                items[name] = _filled(target, checkpointer.restore(folder / name, args=wanted))
    except UnavailableError:
        raise
    except Exception as error:  # what damage looks like is up to the storage layer
        raise _unreadable(folder, error) from error
    notes = []
    if record is None:
        notes.append(f"the checkpoint {folder} is of a version that kept no digests: it is used unchecked")
    return items, notes, record


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    text = str(error)
    refused = any(os.strerror(code) in text for code in _PASSING)
    return (UnavailableError if refused else CheckpointError)(
        f"the checkpoint {folder} cannot be read ({reason(error)})"
    )


def _recorded(folder: Path) -> dict[str, Any] | None:
    """What was noted down when it was saved; None for checkpoints from before that was done."""
    parts = parse_json((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    if DIGESTS not in parts:
        return None
    record: dict[str, Any] = parse_json((folder / DIGESTS / _DIGESTS_FILE).read_text())
    if record["version"] > DIGESTS_VERSION:
        raise UnavailableError(
            f"the checkpoint {folder} is of a newer mpdit_jax (its digests are of version {record['version']})"
        )
    items = record["items"]
    if not isinstance(record["step"], int) or not all(isinstance(digests, dict) for digests in items.values()):
        raise ValueError("its digests are damaged")
    return record


def _only(target: Any, stored: Any) -> Any:
    """The part of a tree of dicts that is stored."""
    if not isinstance(target, Mapping):
        return target
    return {name: _only(value, stored[name]) for name, value in target.items() if name in stored}


def _filled(target: Any, restored: Any) -> Any:
    """A tree of dicts as `target` has it, with zeros for what was not stored."""
    if not isinstance(target, Mapping):
        return restored
    return {
        name: _filled(value, restored[name]) if name in restored else _zeros(value) for name, value in target.items()
    }


def _zeros(target: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.jit(lambda: jax.numpy.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)(), target
    )


def _verify(folder: Path, items: Mapping[str, Any], record: Mapping[str, Any] | None) -> None:
    if record is None:
        return
    if record["step"] != int(folder.name):
        raise CheckpointError(f"the checkpoint {folder} is of step {record['step']}, not of the one it is named after")
    for name, tree in items.items():
        saved = record["items"].get(name, {})
        found = integrity.digests(tree)
        if name == _EXTENSIBLE:
            found = {path: digest for path, digest in found.items() if path in saved}
        wrong = integrity.differing(saved, found)
        if wrong:
            more = f" and {len(wrong) - 1} more arrays" if len(wrong) > 1 else ""
            raise CheckpointError(f"the checkpoint {folder} is damaged ({name}/{wrong[0]}{more} is not what was saved)")
