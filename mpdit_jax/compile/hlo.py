"""A compiled program's text, read as instructions and how often each runs.

`compiled.cost_analysis()` counts the body of a loop once however often it runs; what is counted here counts as often.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_PLACES = re.compile(r"(condition|body)=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:?=?\{"?n"?:"?(\d+)')
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
# What these apply to each element costs nothing that is counted; what an asynchronous end names has been called before.
_NOT_FOLLOWED = ("reduce", "sort", "scatter", "map", "async-update", "async-done", "all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
        name: without %.
        shape: text of the result's type, such as "(f32[2,3]{1,0}, s32[])".
        operation: such as "dot".
        rest: the line after the operation's opening bracket: operands, then attributes.
        is_root: whether the computation's result is this.
    """

    name: str
    shape: str
    operation: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands. (Only names carry a %, and attributes come after the first closing bracket.)"""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction as a run of the program meets it.

    Attributes:
        instruction: the instruction.
        times: how often it runs.
        computation: what it is part of, by name.
        callers: the instructions through which that was called, outermost first.
    """

    instruction: Instruction
    times: int
    computation: Computation
    callers: tuple[Instruction, ...]


def walk(text: str) -> Iterator[Visit]:
    """Every instruction that a run of the program executes; a loop's body as often as it runs.

    Args:
        text: `compiled.as_text()`.
    """
    entry, computations = _parse(text)
    if entry:
        yield from _walk(computations, entry, 1, ())


def dimensions(shape: str) -> list[tuple[int, ...]]:
    """The dimensions of each array in the text of a (tuple) type."""
    return [_numbers(listed) for _, listed in _SHAPE.findall(shape)]


def sizes(shape: str) -> list[int]:
    """Bytes of each array in the text of a (tuple) type."""
    found = []
    for dtype, listed in _SHAPE.findall(shape):
        bits = _BITS.get(dtype) or (int(dtype[1:]) if dtype[:1] in "su" and dtype[1:].isdigit() else 0)
        for size in _numbers(listed):
            bits *= size
        found.append(bits // 8)
    return found


def _numbers(listed: str) -> tuple[int, ...]:
    return tuple(int(size) for size in listed.split(",") if size)


def _parse(text: str) -> tuple[str, dict[str, Computation]]:
    """The entry's name and every computation."""
    entry, found, current = "", dict[str, Computation](), Computation()
    for line in text.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction:
            root, name, shape, operation, rest = instruction.groups()
            current[name] = Instruction(name, shape, operation, rest, bool(root))
            continue
        start = _COMPUTATION.match(line)
        if start and not line.startswith("HloModule"):
            current = found.setdefault(start[1], {})
            entry = start[1] if line.startswith("ENTRY") else entry
    return entry, found


def _walk(
    computations: Mapping[str, Computation], name: str, times: int, callers: tuple[Instruction, ...]
) -> Iterator[Visit]:
    for instruction in computations[name].values():
        yield Visit(instruction, times, computations[name], callers)
        if instruction.operation.removesuffix("-start") in _NOT_FOLLOWED:
            continue
        called = _CALLED.findall(instruction.rest)
        for branches in _BRANCHES.findall(instruction.rest):
            called.extend(part.strip().lstrip("%") for part in branches.split(","))
        inner = times * _trips(instruction, computations) if instruction.operation == "while" else times
        for other in called:
            if other in computations:
                yield from _walk(computations, other, inner, (*callers, instruction))


def _trips(loop: Instruction, computations: Mapping[str, Computation]) -> int:
    """How often a loop runs: as the compiler says, else by its condition "index < limit" and the index's step."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    places = dict(_PLACES.findall(loop.rest))
    condition, body = (computations.get(places.get(part, ""), {}) for part in ("condition", "body"))
    limit = max((number for line in condition.values() if (number := _constant(line)) is not None), default=1)
    # The index is the entry of the loop's tuple that the condition reads.
    reads = [re.search(r"index=(\d+)", line.rest) for line in condition.values() if line.operation.startswith("get-")]
    result = next((line.operands for line in body.values() if line.is_root), [])
    for read in filter(None, reads):
        step = body.get(result[int(read[1])]) if int(read[1]) < len(result) else None
        if step is not None and step.operation == "add":
            added = [_constant(body[name]) for name in step.operands if name in body]
            return -(-limit // max(filter(None, added), default=1))
    return limit


def _constant(line: Instruction) -> int | None:
    whole = line.operation == "constant" and re.match(r"[su]\d+\[\]", line.shape)
    number = re.match(r"(\d+)\)", line.rest)
    return int(number[1]) if whole and number else None
