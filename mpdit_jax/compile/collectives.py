"""Bytes that a compiled program moves between chips, read from its text."""

import dataclasses
import math
import re

from mpdit_jax.compile.hlo import Instruction, Visit, dimensions, sizes, walk
from mpdit_jax.errors import ConfigError

_MESH = re.compile(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one chip's collectives move in a run of a program.

    Attributes:
        by_kind: bytes of the arrays that the chip puts into or takes out of them: of an all-gather its result, of a
            reduce-scatter its operand, which are the whole array.
        sent: bytes that the chip sends, each collective as a ring of its n chips: of a gathered or scattered array all
            but one nth, of an all-reduce, which is both, twice that.
    """

    by_kind: dict[str, int]
    sent: float


def traffic(text: str, chips: int) -> Traffic:
    """What a program's collectives move; the body of a loop counts as often as it runs.

    TPU programs do many of them as rings beside the product that needs them: those are loops of collective permutes,
    each of which moves one chip's part.

    Args:
        text: `compiled.as_text()`.
        chips: that the program runs on.

    Raises:
        ConfigError: a program whose groups of chips cannot be read.
    """
    by_kind, sent = dict.fromkeys(KINDS, 0), 0.0
    for visit in walk(text):
        operation = visit.instruction.operation
        kind = operation.removesuffix("-start")
        if kind not in KINDS or _goes_on(visit):
            continue
        members = _members(visit.instruction.rest, chips)
        size = visit.times * _whole(visit.instruction, kind, members)
        if kind == "all-reduce" and any("calls=%all-reduce-scatter" in caller.rest for caller in visit.callers):
            kind = "reduce-scatter"  # as TPU programs write it: a sum of which each chip takes its part
        by_kind[kind] += size
        rounds = {"all-reduce": 2, "collective-permute": 0}.get(kind, 1)
        sent += size * rounds * (members - 1) / members if rounds else size
    return Traffic(by_kind, sent)


def _whole(collective: Instruction, kind: str, members: int) -> int:
    """Bytes of the arrays of one collective, each whole: what is gathered, or what is to be scattered."""
    if kind == "all-reduce" or not collective.operation.endswith("-start"):
        return sum(sizes(collective.shape)) * (members if kind == "reduce-scatter" else 1)
    # Operands and results, of one collective or several: of a gathered or scattered array one nth and the whole.
    both = sum(size for size, shape in zip(sizes(collective.shape), dimensions(collective.shape), strict=True) if shape)
    return both * members // (members + 1) if kind in ("all-gather", "reduce-scatter") else both // 2


def _goes_on(visit: Visit) -> bool:
    """Whether this collective was counted where it started: TPU programs repeat it in every fusion that it runs beside
    and in the one that waits for it.
    """
    return any(
        "calls=%async_collective_fusion" in caller.rest or caller.name.startswith("async-collective-done")
        for caller in visit.callers
    )


def _members(rest: str, chips: int) -> int:
    """How many chips take part in one collective: those of a group, and without groups all.

    Groups are listed, `{{0,1},{2,3}}`, or counted, `[2,2]<=[4]`, or axes of a mesh, `mesh['a'=2,'b'=2] {'b'}`, of which
    `'b':(2)4` is a part.
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
