"""Bytes that a compiled program moves between chips, read from its text."""

import re
from collections.abc import Mapping

from mpdit_jax.compiling.hlo import Visit, sizes, walk

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of the arrays that one chip puts into or takes out of collectives in a run of a program, by kind.

    A loop's body counts as often as it runs. An all-gather counts by its result, a reduce-scatter by its operand: both
    are the whole array. TPU programs do many of them as rings beside the product that needs them: those are loops of
    collective permutes, each of which moves one chip's part.

    Args:
        text: `compiled.as_text()`.
    """
    totals = dict.fromkeys(KINDS, 0)
    for visit in walk(text):
        operation = visit.instruction.operation
        kind = operation.removesuffix("-start")
        if kind not in KINDS or _goes_on(visit):
            continue
        found = sizes(visit.instruction.shape)
        if operation.endswith("-start") and kind != "all-reduce" and len(found) > 1:
            found = [max(found)]  # operand and result travel together
        size = sum(found)
        if kind == "reduce-scatter" and not operation.endswith("-start"):
            size *= _group_size(visit.instruction.rest)
        totals[kind] += visit.times * size
    return totals


def ring_bytes(totals: Mapping[str, int]) -> float:
    """Bytes that each chip sends: an all-reduce is a reduce-scatter and an all-gather.

    Whole arrays count. Of n chips in a ring each sends one nth less, 6 % of 16.
    """
    return sum(size * (2 if kind == "all-reduce" else 1) for kind, size in totals.items())


def _goes_on(visit: Visit) -> bool:
    """Whether this collective was counted where it started: TPU programs repeat it in every fusion that it runs beside
    and in the one that waits for it.
    """
    return any(
        "calls=%async_collective_fusion" in caller.rest or caller.name.startswith("async-collective-done")
        for caller in visit.callers
    )


def _group_size(rest: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    return len(listed[1].split(",")) if listed else int(iota[1]) if iota else 1
