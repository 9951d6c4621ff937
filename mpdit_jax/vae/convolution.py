"""Convolutions of the VAE: XLA's own on accelerators, fewer multiplications on CPUs.

XLA's CPU convolution is one matrix product that runs near the peak of the processor, so the way to be faster is to
multiply less. Both rewrites below are exact in real arithmetic and stay within about 1e-5 (relative) in float32. On
GPUs and TPUs, whose libraries choose their own algorithms, nothing of this is compiled.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# Winograd's minimal filtering F(4, 3): four outputs of a 3-tap filter from six products instead of twelve
# (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", 2016). Points 0, ±1, ±2, ∞.
_TILE = 4
_INPUT_TRANSFORM = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
_KERNEL_TRANSFORM = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float32,
)
_OUTPUT_TRANSFORM = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    np.float32,
)
# Below these the transforms cost more than the products they save. The batch has no say, so that an image's latents do
# not depend on the images beside it.
_MIN_CHANNELS = 64
_MIN_PIXELS = 4096


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> jax.Array:
    """Correlates images with a kernel and adds a bias, as every deep-learning library's convolution does.

    Args:
        x: channels-last images, float32 or bfloat16.
        kernel: height, width, input and output channels; cast to the dtype of `x`.
        bias: float32, one for each output channel.
        stride: step along height and width.
        padding: zeros before and after, along height and width.

    Returns:
        The feature maps in float32, for the caller to round once.
    """
    direct = partial(_direct, stride=stride, padding=(padding, padding))
    _, height, width, inputs = x.shape
    worthwhile = (
        (*kernel.shape[:2], stride, *padding) == (3, 3, 1, 1, 1)
        and width % _TILE == 0
        and height * width >= _MIN_PIXELS
        and min(inputs, kernel.shape[3]) >= _MIN_CHANNELS
    )
    on_cpu = _winograd_along_width if worthwhile else direct
    sums = jax.lax.platform_dependent(x, kernel, cpu=partial(_in_float32, on_cpu), default=partial(_widened, direct))
    return sums + bias


def upsample_conv2d(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Convolves the image doubled by nearest-neighbour repetition; arguments as in `conv2d`."""
    sums = jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_in_float32, _upsample_conv_by_phase),
        default=partial(_widened, _repeat_then_conv),
    )
    return sums + bias


def _in_float32(convolve: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes in float32 what comes in another dtype: CPUs without bfloat16 units emulate it slowly."""
    return convolve(x.astype(jnp.float32), kernel.astype(jnp.float32))


def _widened(convolve: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolve(x, kernel).astype(jnp.float32)


def _direct(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    # float32 means float32: "highest" keeps TPUs and GPUs from rounding the operands to bfloat16 or TF32.
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        padding,
        dimension_numbers=_LAYOUT,
        precision=jax.lax.Precision.HIGHEST,
    )


def _repeat_then_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    doubled = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return _direct(doubled, kernel, stride=1, padding=((1, 1), (1, 1)))


def _winograd_along_width(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution that filters the width by F(4, 3): half the products, for 1.5 times the memory of `x`.

    The two-dimensional variant would save more products but quadruples the data, which costs more than it saves.
    """
    batch, height, width, _ = x.shape
    tiles, points = width // _TILE, _TILE + 2
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))  # (B, H, W + 2, I)
    # The n-th of a tile's six inputs, for all tiles at once: (B, H, W/4, I).
    taps = [padded[:, :, n : n + _TILE * (tiles - 1) + 1 : _TILE] for n in range(points)]
    columns = jnp.einsum("pj,ijco->pico", _KERNEL_TRANSFORM, kernel, precision="highest")[:, :, None]  # (6, 3, 1, I, O)
    products = [
        _direct(tap, column, stride=1, padding=((1, 1), (0, 0)))
        for tap, column in zip(_combine(_INPUT_TRANSFORM, taps), columns, strict=True)
    ]
    outputs = _combine(_OUTPUT_TRANSFORM, products)
    return jnp.stack(outputs, axis=3).reshape(batch, height, width, kernel.shape[3])


def _combine(matrix: np.ndarray, terms: list[jax.Array]) -> list[jax.Array]:
    """Multiplies a small constant matrix with a list of arrays, leaving out the zeros."""
    combined = []
    for row in matrix:
        first, *others = [float(m) * term for m, term in zip(row, terms, strict=True) if m]
        combined.append(sum(others, start=first))
    return combined


def _upsample_conv_by_phase(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Doubling and a 3x3 convolution as four 2x2 convolutions of the small image, one for each output parity.

    Of the three kernel rows that meet a doubled image, two always fall on the same source row, so they can be added
    beforehand: 16 products per source pixel instead of 36, and the doubled image is never made.
    """
    batch, height, width, _ = x.shape
    rows = []
    for i, of_row in enumerate(_merge_taps(kernel, axis=0)):
        phases = [
            _direct(x, part, stride=1, padding=((1 - i, i), (1 - j, j)))  # (B, H, W, O)
            for j, part in enumerate(_merge_taps(of_row, axis=1))
        ]
        rows.append(jnp.stack(phases, axis=3))  # (B, H, W, 2, O)
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, kernel.shape[3])


def _merge_taps(kernel: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Gives the two taps that outputs at even and at odd positions apply to the small image."""
    first, second, third = jnp.split(kernel, 3, axis=axis)
    even = jnp.concatenate([first, second + third], axis)
    odd = jnp.concatenate([first + second, third], axis)
    return even, odd
