"""Floating-point operations of a compiled program's matrix products, read from its text.

XLA writes a product as a `dot`; for TPUs it turns most into a `convolution`, whose window, dilated, can stand for the
batch dimensions of a product: positions where the window meets padding or the gaps between dilated entries multiply
nothing and do not count.
"""

import re
from math import prod

from mpdit_jax.compile.hlo import Visit, dimensions, walk


def product_flops(text: str) -> int:
    """Operations of all matrix products of a run on one chip: 2 a multiply-add, loops as often as they run.

    Args:
        text: `compiled.as_text()`.
    """
    counters = {"dot": _dot, "convolution": _convolution}
    return sum(
        2 * visit.times * counters[visit.instruction.operation](visit)
        for visit in walk(text)
        if visit.instruction.operation in counters
    )


def _operands(visit: Visit) -> list[tuple[int, ...]]:
    return [dimensions(visit.computation[name].shape)[0] for name in visit.instruction.operands]


def _dot(visit: Visit) -> int:
    left = _operands(visit)[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", visit.instruction.rest)
    lengths = [left[int(axis)] for axis in contracted[1].split(",") if axis] if contracted else []
    return prod(dimensions(visit.instruction.shape)[0]) * prod(lengths)


def _convolution(visit: Visit) -> int:
    image, kernel = _operands(visit)
    result = dimensions(visit.instruction.shape)[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", visit.instruction.rest)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {visit.instruction.rest[:200]}")
    of_image, of_kernel, of_result = labels.groups()
    total = result[of_result.index("b")] * result[of_result.index("f")] * kernel[of_kernel.index("i")]
    for axis in filter(str.isdigit, of_result):
        total *= _meetings(
            image[of_image.index(axis)],
            kernel[of_kernel.index(axis)],
            result[of_result.index(axis)],
            _window(visit.instruction.rest, int(axis)),
        )
    return total


def _window(rest: str, axis: int) -> dict[str, int]:
    """Stride, dilations and lower padding along one axis; what is not written is 1, or 0 for padding."""
    found = {"stride": 1, "lhs_dilate": 1, "rhs_dilate": 1, "pad": 0}
    window = re.search(r"window=\{([^}]*)\}", rest)
    for name, values in re.findall(r"(\w+)=([\dx_\-]+)", window[1] if window else ""):
        if name in found:
            found[name] = int(values.split("x")[axis].partition("_")[0])
    return found


def _meetings(image: int, kernel: int, result: int, window: dict[str, int]) -> int:
    """Pairs of a result's and a kernel's position between which an entry of the image lies."""
    end, gap = (image - 1) * window["lhs_dilate"] + 1, window["lhs_dilate"]
    return sum(
        0 <= (place := out * window["stride"] + inner * window["rhs_dilate"] - window["pad"]) < end and place % gap == 0
        for out in range(result)
        for inner in range(kernel)
    )
