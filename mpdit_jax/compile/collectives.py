"""Bytes that a compiled program moves between devices, read from its HLO text."""

import dataclasses
import math
import re

import numpy as np

from mpdit_jax.compile.hlo import Instruction, Visit, dimensions, sizes, walk
from mpdit_jax.errors import ConfigError

_MESH = re.compile(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes moved by one device's collectives in a run of a program."""

    by_kind: dict[str, int]  # size of the whole arrays: an all-gather's result, a reduce-scatter's operand
    # Bytes sent inside a host if each collective runs as a ring of its n devices: (n - 1) / n of a gathered or
    # scattered array, twice as much of an all-reduce, which scatters and gathers, and all of a permuted array.
    sent: float
    # Bytes sent to other hosts, if devices of h hosts first exchange their parts with their h - 1 peers: (h - 1) / n of
    # a gathered or scattered array.
    crossed: float
    overlapped: int  # collectives of a GPU program that run beside its computation
    waited_for: int  # collectives of a GPU program that do not


def traffic(text: str, chips: int, per_host: int = 0) -> Traffic:
    """Count the bytes that the collectives of `compiled.as_text()` move; a loop's body counts as often as it runs.

    TPU programs run many collectives as a loop of collective permutes, each of which moves one chip's part, beside the
    product that needs the result.

    Args:
        text: the compiled program.
        chips: number of devices.
        per_host: devices of a host; 0 if all are linked alike, as in a slice of a TPU pod.

    Raises:
        ConfigError: the groups of devices cannot be parsed.
    """
    by_kind, sent, crossed = dict.fromkeys(KINDS, 0), 0.0, 0.0
    synchronous = [0, 0]
    for visit in walk(text):
        operation = visit.instruction.operation
        if operation == "send" and "megascale" in visit.instruction.rest:  # to another slice, by the hosts
            crossed += visit.times * sizes(visit.instruction.shape)[0]
        kind = operation.removesuffix("-start")
        if kind not in KINDS or _is_repeated(visit):
            continue
        group = _group(visit.instruction.rest, chips)
        members, hosts = len(group), len(np.unique(group // per_host)) if per_host else 1
        size = visit.times * _array_bytes(visit.instruction, kind, members)
        if (is_synchronous := re.search(r'"is_sync":(true|false)', visit.instruction.rest)) is not None:
            synchronous[is_synchronous[1] == "true"] += 1
        if kind == "all-reduce" and any("calls=%all-reduce-scatter" in caller.rest for caller in visit.callers):
            kind = "reduce-scatter"  # TPU programs write it as an all-reduce of which each chip slices its part
        by_kind[kind] += size
        rounds = {"all-reduce": 2, "collective-permute": 0}.get(kind, 1)
        if rounds:
            near = members / hosts
            sent += size * rounds * (near - 1) / near
            crossed += size * rounds * (hosts - 1) / members
        elif hosts == 1:
            sent += size
        else:
            crossed += size
    return Traffic(by_kind, sent, crossed, *synchronous)


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


def _group(rest: str, chips: int) -> np.ndarray:
    """Return the numbers of the devices in the first group of a collective; without groups it is all devices.

    Groups are written as lists, `{{0,1},{2,3}}`, as counts, `[2,2]<=[4]` or `[2,2]<=[2,2]T(1,0)`, or as axes of a mesh,
    `mesh['a'=2,'b'=2] {'b'}`, where `'b':(2)4` is a sub-axis of size 4 below one of size 2.
    """
    if (listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest)) is not None:
        return np.array(_integers(listed[1]))
    if (counted := _COUNTED.search(rest)) is not None:
        shape, sizes, order = (_integers(part or "") for part in counted.groups())
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        return devices.transpose(order or None).reshape(shape)[0]
    if (mesh := _MESH.search(rest)) is not None:
        parts = {name: (1, int(size), 1) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[2])
        for name, above, size in chosen:
            if size:
                parts[name] = (int(above), int(size), parts[name][1] // (int(above) * int(size)))
        devices = np.arange(chips)
        if (permuted := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", rest)) is not None:
            devices = devices.reshape(_integers(permuted[1])).transpose(_integers(permuted[2]))
        devices = devices.reshape([size for part in parts.values() for size in part])
        names = {name for name, _, _ in chosen}
        return devices[tuple(each for name in parts for each in (0, slice(None) if name in names else 0, 0))].ravel()
    if "replica_groups=" in rest.replace("replica_groups={}", ""):
        raise ConfigError(f"the compiled program groups devices in a way that is not known here: {rest[:200]}")
    return np.arange(chips)


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
