"""Values that all processes must share before each evaluates its share of the images, from the files that it finds."""

import json
from collections.abc import Mapping
from typing import Any

import jax

from mpdit_jax.distributed.collectives import assert_equal_across_processes, barrier, first_sentence

_OF_ONE_PLACE = {"path", "files", "workdir", "png_folder"}


def portable(about: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an image set's `about` that a copy elsewhere shares: without paths and times of change."""
    return {
        name: portable(value) if isinstance(value, Mapping) else value
        for name, value in about.items()
        if name not in _OF_ONE_PLACE
    }


def assert_shared(values: Mapping[str, Any]) -> None:
    """Raise ProcessError on every process unless all have the same values, which JSON can hold. Collective.

    Otherwise processes would evaluate shares of different sets, and merge them without an error.
    """
    if jax.process_count() == 1:
        return
    barrier("the files are compared")
    texts = {name: json.dumps(value, sort_keys=True) for name, value in values.items()}
    assert_equal_across_processes(texts, remedy="give all machines the same files")


def name_from_process_0(name: str) -> str:
    """Process 0's name of a shared file; the others' differ where their sets lie elsewhere. Collective."""
    return first_sentence(name, "process 0 names a file")
