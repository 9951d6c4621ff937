"""Parser of a compiled program's HLO text: its instructions and how often each runs.

`compiled.cost_analysis()` counts a loop's body once; here it counts as often as it runs.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from math import prod

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP_PARTS = re.compile(r"(condition|body)=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'known_trip_count"?:?=?\{"?n"?:"?(\d+)')
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
# Element functions contain no matrix product or collective; the end of an asynchronous call names its start's function.
_NOT_FOLLOWED = ("reduce", "sort", "scatter", "map", "async-update", "async-done", "all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction."""

    name: str  # without %
    shape: str  # the result's type, such as "(f32[2,3]{1,0}, s32[])"
    operation: str  # such as "dot"
    rest: str  # the line after the operation's opening bracket: operands, then attributes
    is_root: bool  # whether it is the computation's result

    @property
    def operands(self) -> list[str]:
        """Names of the operands, which begin with % and stand before the first closing bracket."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction that a run of the program executes."""

    instruction: Instruction
    times: int  # how often it runs
    computation: Computation  # the computation that contains it
    callers: tuple[Instruction, ...]  # the instructions that led to it, outermost first


def walk(text: str) -> Iterator[Visit]:
    """Yield every instruction that a run of the program `compiled.as_text()` executes."""
    entry, computations = _parse(text)
    if entry:
        yield from _walk(computations, entry, 1, ())


def dimensions(shape: str) -> list[tuple[int, ...]]:
    """Return the dimensions of each array in a (tuple) type."""
    return [_numbers(listed) for _, listed in _SHAPE.findall(shape)]


def sizes(shape: str) -> list[int]:
    """Return the bytes of each array in a (tuple) type."""
    return [_bits(dtype) * prod(_numbers(listed)) // 8 for dtype, listed in _SHAPE.findall(shape)]


def _bits(dtype: str) -> int:
    """Return the bits of one element; 0 for a type without data, such as a token."""
    return _BITS.get(dtype) or (int(dtype[1:]) if dtype[:1] in "su" and dtype[1:].isdigit() else 0)


def _numbers(listed: str) -> tuple[int, ...]:
    return tuple(int(size) for size in listed.split(",") if size)


def _parse(text: str) -> tuple[str, dict[str, Computation]]:
    """Return the name of the entry computation, and all computations by name."""
    entry, computations, current = "", dict[str, Computation](), Computation()
    for line in text.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction:
            root, name, shape, operation, rest = instruction.groups()
            current[name] = Instruction(name, shape, operation, rest, bool(root))
            continue
        start = _COMPUTATION.match(line)
        if start and not line.startswith("HloModule"):
            current = computations.setdefault(start[1], {})
            entry = start[1] if line.startswith("ENTRY") else entry
    return entry, computations


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
        inner = times * _trip_count(instruction, computations) if instruction.operation == "while" else times
        for callee in called:
            if callee in computations:
                yield from _walk(computations, callee, inner, (*callers, instruction))


def _trip_count(loop: Instruction, computations: Mapping[str, Computation]) -> int:
    """Return how often a loop runs: the compiler's number, else from the condition "index < limit" and the step."""
    if known := _TRIP_COUNT.search(loop.rest):
        return int(known[1])
    names = dict(_LOOP_PARTS.findall(loop.rest))
    condition, body = (computations.get(names.get(part, ""), {}) for part in ("condition", "body"))
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


def _constant(instruction: Instruction) -> int | None:
    """Return the value of an integer constant, None for any other instruction."""
    is_integer = instruction.operation == "constant" and re.match(r"[su]\d+\[\]", instruction.shape)
    number = re.match(r"(\d+)\)", instruction.rest)
    return int(number[1]) if is_integer and number else None
