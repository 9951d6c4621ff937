"""What several processes must have alike before they look at images in shares, each at the files that it finds."""

import json
from collections.abc import Mapping
from typing import Any

import jax

from mpdit_jax.distributed.collectives import assert_equal_across_processes, barrier, first_sentence

_OF_ONE_PLACE = {"path", "files", "workdir", "png_folder"}


def portable(about: Mapping[str, Any]) -> dict[str, Any]:
    """What `ImageBlocks.about` says of a set that a copy elsewhere says as well: no places and no times of change."""
    return {
        name: portable(value) if isinstance(value, Mapping) else value
        for name, value in about.items()
        if name not in _OF_ONE_PLACE
    }


def agree(facts: Mapping[str, Any]) -> None:
    """Raise ProcessError, on every process, unless all have process 0's facts, plain values; all must ask.

    Otherwise each would look at its share of something else, and the shares would be put together without an error.
    """
    if jax.process_count() == 1:
        return
    barrier("what is looked at is compared")
    told = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    assert_equal_across_processes(told, remedy="give all machines the same files")


def name_of_first(name: str) -> str:
    """Process 0's name of what all share; all must ask. Their own may be others, of files at another place."""
    return first_sentence(name, "the first names it")
