"""By which settings the evaluations of a run were made: one curve may hold points that do not compare.

WORKDIR/evaluation/settings.json    [{"from_step": 1000, "settings": {…}}, …], the later ones where they changed
"""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdit_jax.evaluate.report import write_json
from mpdit_jax.io.atomic import remove_stale_tmp
from mpdit_jax.io.json_files import parse_json


def note_settings(path: Path, step: int, settings: Mapping[str, str | int]) -> str:
    """Note by which settings a step was evaluated; a sentence where they are others than those before it, else "".

    What is noted of that step and later ones is of evaluations that were undone, as their lines in `metrics.jsonl` are.

    Raises:
        InputError: it cannot be written.
    """
    stored = _read(path)
    history = [entry for entry in stored if entry["from_step"] < step]
    before = history[-1]["settings"] if history else None
    if before != settings:
        history.append({"from_step": step, "settings": dict(settings)})
    if history != stored:
        remove_stale_tmp(path.parent, glob.escape(path.name))
        write_json(path, history)
    if before is None or before == settings:
        return ""
    changed = ", ".join(
        f"{name} {settings.get(name)} instead of {before.get(name)}"
        for name in sorted({*before, *settings})
        if before.get(name) != settings.get(name)
    )
    return (
        f"evaluations from step {step} on do not compare with those before, though their names are the same: {changed}"
    )


def _read(path: Path) -> list[dict[str, Any]]:
    """What was noted; nothing where there is no such file, or a damaged one."""
    try:
        found = parse_json(path.read_text())
        return [{"from_step": int(entry["from_step"]), "settings": dict(entry["settings"])} for entry in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []
