"""Values of image sets that all processes must share, wherever each finds its files."""

from collections.abc import Mapping
from typing import Any

from mpdit_jax.distributed.collectives import first_sentence

_OF_ONE_PLACE = {"path", "files", "workdir", "png_folder"}


def portable(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an image set's `about` that a copy elsewhere shares: no paths and no times of change."""
    return {
        name: portable(value) if isinstance(value, Mapping) else value
        for name, value in about.items()
        if name not in _OF_ONE_PLACE
    }


def name_from_process_0(name: str) -> str:
    """Return process 0's name of a shared file; names differ where sets lie in different folders. Collective."""
    return first_sentence(name, "process 0 names a file")
