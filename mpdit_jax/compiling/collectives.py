"""Bytes that a compiled program moves between chips, read from its text."""

import re
from collections.abc import Iterator, Mapping

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:?=?\{"?n"?:"?(\d+)')
_CONSTANT = re.compile(r"= s32\[\][^ ]* constant\((\d+)\)")


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of the arrays that one chip puts into or takes out of collectives in a run of a program, by kind.

    A loop's body counts as often as it runs. An all-gather counts by its result, a reduce-scatter by its operand: both
    are the whole array.

    Args:
        text: `compiled.as_text()`.
    """
    computations = _computations(text)
    totals = dict.fromkeys(KINDS, 0)
    entry = next((name for name, (is_entry, _) in computations.items() if is_entry), None)
    if entry is not None:
        _add(computations, entry, 1, totals)
    return totals


def ring_bytes(totals: Mapping[str, int]) -> float:
    """Bytes that each chip sends at least: an all-reduce is a reduce-scatter and an all-gather."""
    return sum(size * (2 if kind == "all-reduce" else 1) for kind, size in totals.items())


def _computations(text: str) -> dict[str, tuple[bool, list[str]]]:
    found: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match and not line.startswith("HloModule"):
            lines = []
            found[match[1]] = (line.startswith("ENTRY"), lines)
        else:
            lines.append(line)
    return found


def _add(computations: dict[str, tuple[bool, list[str]]], name: str, times: int, totals: dict[str, int]) -> None:
    for line in computations[name][1]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        result, operation, rest = match.groups()
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            sizes = list(_sizes(result))
            if operation.endswith("-start") and kind != "all-reduce" and len(sizes) > 1:
                sizes = [max(sizes)]  # operand and result travel together
            size = sum(sizes)
            if kind == "reduce-scatter" and not operation.endswith("-start"):
                size *= _group_size(rest)
            totals[kind] += times * size
        inner = times * _trips(line, computations) if operation == "while" else times
        called = _CALLED.findall(rest) if operation not in (*KINDS, "reduce", "sort", "scatter", "map") else []
        for branches in _BRANCHES.findall(rest):
            called.extend(part.strip().lstrip("%") for part in branches.split(","))
        for other in called:
            if other in computations:
                _add(computations, other, inner, totals)


def _sizes(shapes: str) -> Iterator[int]:
    """Bytes of each array in the text of a (tuple) type."""
    for dtype, dimensions in _SHAPE.findall(shapes):
        bits = _BITS.get(dtype) or (int(dtype[1:]) if dtype[:1] in "su" and dtype[1:].isdigit() else 0)
        count = 1
        for dimension in filter(None, dimensions.split(",")):
            count *= int(dimension)
        yield bits * count // 8


def _group_size(rest: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    return len(listed[1].split(",")) if listed else int(iota[1]) if iota else 1


def _trips(line: str, computations: dict[str, tuple[bool, list[str]]]) -> int:
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = _CONDITION.search(line)
    limits = (
        [int(number) for row in computations[condition[1]][1] for number in _CONSTANT.findall(row)] if condition else []
    )
    return max(limits, default=1)
