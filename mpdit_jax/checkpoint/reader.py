"""Reading of checkpoints: listing them, restoring their arrays, and comparing these with their digests."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdit_jax.checkpoint import digests as integrity
from mpdit_jax.distributed.collectives import first_sentence
from mpdit_jax.errors import CheckpointError, UnavailableError
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.io.paths import reason
from mpdit_jax.io.storage import ItemReader

CHECKPOINTS = "checkpoints"
DIGESTS, DIGESTS_VERSION = "integrity", 1  # the item of a checkpoint that holds the digests of the others
_DIGESTS_FILE = "metadata"  # Orbax's name for the file of a JSON item
# Errors with which the system refuses an undamaged file: no permission, file server away, too many files, no memory.
_PASSING = (
    errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.ENOMEM
)  # fmt: skip


def list_steps(workdir: str | Path) -> list[int]:
    """Return the steps of the finished checkpoints in a workdir, ascending."""
    folder = Path(workdir) / CHECKPOINTS
    return sorted(step for step in numbered_folders(workdir) if is_complete(folder / str(step)))


def newest_in_words(workdir: str | Path) -> str:
    """Return the newest finished checkpoint in words, such as "the checkpoint of step 300"."""
    steps = list_steps(workdir)
    return f"the checkpoint of step {steps[-1]}" if steps else "no checkpoint yet"


def numbered_folders(workdir: str | Path) -> set[int]:
    """Return the steps of all folders named like a checkpoint, damaged or not."""
    folder = Path(workdir) / CHECKPOINTS
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return {int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name))}


def is_complete(folder: Path) -> bool:
    """Return whether a checkpoint has digests, and every part that Orbax lists."""
    try:
        return _has_its_parts(folder)
    except OSError:
        return False


def _has_its_parts(folder: Path) -> bool:
    try:
        parts = parse_json((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
        return DIGESTS in parts and all(
            (folder / part / (_DIGESTS_FILE if part == DIGESTS else "_METADATA")).is_file() for part in parts
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def incomplete(folder: Path) -> str:
    """Return the words for a checkpoint that lacks a part."""
    return f"the checkpoint {folder} is incomplete"


def read_together(folder: Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Read one checkpoint as `read_step` does; raise on all processes if one fails. Collective."""
    problem = refused = ""
    try:
        items, record = _restore(folder, targets)
    except CheckpointError as error:
        problem = str(error)
        refused = problem if isinstance(error, UnavailableError) else ""
    problem = first_sentence(problem, "the checkpoint is read")
    if problem:
        refused = first_sentence(refused, "whether it is damaged")
        raise UnavailableError(refused) if refused else CheckpointError(problem)
    _verify(folder, items, record)
    return items


def read_step(folder: Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Read the items of one checkpoint and compare them with their digests.

    Args:
        folder: of the checkpoint.
        targets: shapes with shardings of each item, by name.

    Raises:
        UnavailableError: it cannot be read now, but may be undamaged.
        CheckpointError: it is damaged.
    """
    items, record = _restore(folder, targets)
    _verify(folder, items, record)
    return items


def _restore(folder: Path, targets: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the items, and the record of digests they should have."""
    try:
        if not _has_its_parts(folder):
            raise CheckpointError(incomplete(folder))
        record = _read_record(folder)
        items = {}
        with ItemReader() as reader:
            for name, target in targets.items():
                items[name] = reader.restore(folder / name, target)
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many classes of errors for damage
        refused = any(os.strerror(code) in str(error) for code in _PASSING)
        raise (UnavailableError if refused else CheckpointError)(
            f"the checkpoint {folder} cannot be read ({reason(error)})"
        ) from error
    return items, record


def _read_record(folder: Path) -> dict[str, Any]:
    """Return the step and the digests that were recorded when the checkpoint was saved."""
    record: dict[str, Any] = parse_json((folder / DIGESTS / _DIGESTS_FILE).read_text())
    if record["version"] > DIGESTS_VERSION:
        raise UnavailableError(
            f"the checkpoint {folder} is of a newer mpdit_jax (its digests are of version {record['version']})"
        )
    items = record["items"]
    if not isinstance(record["step"], int) or not all(isinstance(digests, dict) for digests in items.values()):
        raise ValueError("its digests are damaged")
    return record


def _verify(folder: Path, items: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    if record["step"] != int(folder.name):
        raise CheckpointError(f"the checkpoint {folder} is of step {record['step']}, not of the one it is named after")
    for name, tree in items.items():
        saved = record["items"].get(name, {})
        found = integrity.digests(tree)
        wrong = integrity.differing(saved, found)
        if wrong:
            more = f" and {len(wrong) - 1} more arrays" if len(wrong) > 1 else ""
            raise CheckpointError(f"the checkpoint {folder} is damaged ({name}/{wrong[0]}{more} is not what was saved)")
