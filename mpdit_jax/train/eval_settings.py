"""The history of a run's evaluation settings, since points of a curve do not compare if a setting changed in between.

WORKDIR/evaluation/settings.json    [{"from_step": 1000, "settings": {…}}, …], one entry for every change
"""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdit_jax.evaluate.report import write_json
from mpdit_jax.io.atomic import remove_stale_tmp
from mpdit_jax.io.json_files import parse_json


def note_settings(path: Path, step: int, settings: Mapping[str, str | int]) -> str:
    """Store the settings of a step's evaluation; return a sentence if they differ from the settings before, else "".

    Entries of this step and of later steps are dropped, because their evaluations are made again.

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
    return f"evaluations from step {step} on cannot be compared with earlier ones of the same name: {changed}"


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the stored entries; none where the file is missing or damaged."""
    try:
        found = parse_json(path.read_text())
        return [{"from_step": int(entry["from_step"]), "settings": dict(entry["settings"])} for entry in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []
