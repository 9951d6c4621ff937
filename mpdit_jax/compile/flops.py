"""Floating-point operations of a compiled program's matrix products, read from its HLO text.

XLA writes a product as a `dot`, but for TPUs mostly as a `convolution`, and for GPUs as a call of cuBLAS. A dilated
window can represent the batch dimensions of a product, so window positions on padding or on the gaps between dilated
entries are not counted.
"""

import re
from math import prod

from mpdit_jax.compile.hlo import Visit, dimensions, walk

_CUBLAS = re.compile(r'custom_call_target="__cublas\$(?:lt\$matmul|gemm)')


def product_flops(text: str) -> int:
    """Count one device's operations in the matrix products of `compiled.as_text()`: 2 per multiply-add; a loop's body
    counts as often as it runs.
    """
    return sum(product_flops_by_library(text).values())


def product_flops_by_library(text: str) -> dict[str, int]:
    """Return the operations of `product_flops` by what computes them: "cuBLAS", "Triton" or "XLA"."""
    counters = {"dot": _dot, "convolution": _convolution, "custom-call": _library_call}
    found = dict.fromkeys(("cuBLAS", "Triton", "XLA"), 0)
    for visit in walk(text):
        if (counter := counters.get(visit.instruction.operation)) is not None:
            found[_library(visit)] += 2 * visit.times * counter(visit)
    return found


def _library(visit: Visit) -> str:
    if visit.instruction.operation == "custom-call":
        return "cuBLAS"
    return "Triton" if any('"kind":"__triton' in caller.rest for caller in visit.callers) else "XLA"


def _library_call(visit: Visit) -> int:
    """Count the multiply-adds of a call of cuBLAS, and 0 for a call of anything else."""
    if not _CUBLAS.search(visit.instruction.rest):
        return 0
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^]]*)\]', visit.instruction.rest)
    axes = re.findall(r"\d+", contracted[1]) if contracted else []
    left = _operands(visit)[0]
    return prod(dimensions(visit.instruction.shape)[0]) * prod(left[int(axis)] for axis in axes)


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
        total *= _window_products(
            image[of_image.index(axis)],
            kernel[of_kernel.index(axis)],
            result[of_result.index(axis)],
            _window(visit.instruction.rest, int(axis)),
        )
    return total


def _window(rest: str, axis: int) -> dict[str, int]:
    """Parse stride, dilations and lower padding along one axis."""
    window = {"stride": 1, "lhs_dilate": 1, "rhs_dilate": 1, "pad": 0}
    text = re.search(r"window=\{([^}]*)\}", rest)
    for name, values in re.findall(r"(\w+)=([\dx_\-]+)", text[1] if text else ""):
        if name in window:
            window[name] = int(values.split("x")[axis].partition("_")[0])
    return window


def _window_products(image: int, kernel: int, result: int, window: dict[str, int]) -> int:
    """Count the pairs of a result position and a kernel position that read an entry of the image."""
    end, gap = (image - 1) * window["lhs_dilate"] + 1, window["lhs_dilate"]
    return sum(
        0 <= (at := out * window["stride"] + tap * window["rhs_dilate"] - window["pad"]) < end and at % gap == 0
        for out in range(result)
        for tap in range(kernel)
    )
