"""Bytes that a compiled program moves between chips, read from its HLO text."""

import dataclasses
import math
import re

from mpdit_jax.compile.hlo import Instruction, Visit, dimensions, sizes, walk
from mpdit_jax.errors import ConfigError

_MESH = re.compile(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes moved by one chip's collectives in a run of a program."""

    by_kind: dict[str, int]  # size of the whole arrays: an all-gather's result, a reduce-scatter's operand
    # Bytes sent if each collective runs as a ring of its n chips: (n - 1) / n of a gathered or scattered array, twice
    # as much of an all-reduce, which scatters and gathers, and all of a permuted array.
    sent: float


def traffic(text: str, chips: int) -> Traffic:
    """Count the bytes that the collectives of `compiled.as_text()` move; a loop's body counts as often as it runs.

    TPU programs run many collectives as a loop of collective permutes, each of which moves one chip's part, beside the
    product that needs the result. Raise ConfigError if the groups of chips cannot be parsed.
    """
    by_kind, sent = dict.fromkeys(KINDS, 0), 0.0
    for visit in walk(text):
        operation = visit.instruction.operation
        kind = operation.removesuffix("-start")
        if kind not in KINDS or _is_repeated(visit):
            continue
        members = _group_size(visit.instruction.rest, chips)
        size = visit.times * _array_bytes(visit.instruction, kind, members)
        if kind == "all-reduce" and any("calls=%all-reduce-scatter" in caller.rest for caller in visit.callers):
            kind = "reduce-scatter"  # TPU programs write it as an all-reduce of which each chip slices its part
        by_kind[kind] += size
        rounds = {"all-reduce": 2, "collective-permute": 0}.get(kind, 1)
        sent += size * rounds * (members - 1) / members if rounds else size
    return Traffic(by_kind, sent)


def _array_bytes(collective: Instruction, kind: str, members: int) -> int:
    """Return the size of the whole arrays of one collective."""
    if kind == "all-reduce" or not collective.operation.endswith("-start"):
        return sum(sizes(collective.shape)) * (members if kind == "reduce-scatter" else 1)
    # The shape of a "-start" lists operands and results; one of the two is 1/n of a gathered or scattered array.
    both = sum(size for size, shape in zip(sizes(collective.shape), dimensions(collective.shape), strict=True) if shape)
    return both * members // (members + 1) if kind in ("all-gather", "reduce-scatter") else both // 2


def _is_repeated(visit: Visit) -> bool:
    """Return whether the collective is counted elsewhere: TPU programs repeat an asynchronous collective in every
    fusion that runs beside it and in the fusion that waits for it.
    """
    return any(
        "calls=%async_collective_fusion" in caller.rest or caller.name.startswith("async-collective-done")
        for caller in visit.callers
    )


def _group_size(rest: str, chips: int) -> int:
    """Return the number of chips in one group of a collective; without groups it is all chips.

    Groups are written as lists, `{{0,1},{2,3}}`, as counts, `[2,2]<=[4]`, or as axes of a mesh,
    `mesh['a'=2,'b'=2] {'b'}`, where `'b':(2)4` is a sub-axis of size 4.
    """
    if (listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest)) is not None:
        return len(listed[1].split(","))
    if (counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest)) is not None:
        return int(counted[1])
    if (mesh := _MESH.search(rest)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(part or sizes[name]) for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]))
    if "replica_groups=" in rest.replace("replica_groups={}", ""):
        raise ConfigError(f"the compiled program groups chips in a way that is not known here: {rest[:200]}")
    return chips
