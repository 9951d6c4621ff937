"""Convolutions of the VAE: XLA's own on GPUs and TPUs, algorithms with fewer multiplications on CPUs.

XLA's CPU convolution is one matrix product near the processor's peak, so only fewer multiplications make it faster.
Both algorithms are exact in real arithmetic and have a relative error of about 1e-5 in float32.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# Winograd's minimal filtering F(4, 3): four outputs of a 3-tap filter from six products instead of twelve
# (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks"), with the points 0, ±1, ±2, ∞.
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
# For fewer channels or pixels the transforms cost more than the saved products. The batch size plays no role, so that
# an image's latents do not depend on its batch.
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
    """Convolve images (as a correlation) and add a bias; the result is float32.

    Args:
        x: images (B, H, W, inputs), float32 or bfloat16.
        kernel: (height, width, inputs, outputs); cast to the dtype of `x`.
        bias: float32 (outputs,).
        stride: stride along height and width.
        padding: zeros before and after, along height and width.
    """
    direct = partial(_direct, stride=stride, padding=(padding, padding))
    _, height, width, inputs = x.shape
    worthwhile = (
        (*kernel.shape[:2], stride, *padding) == (3, 3, 1, 1, 1)
        and width % _TILE == 0
        and height * width >= _MIN_PIXELS
        and min(inputs, kernel.shape[3]) >= _MIN_CHANNELS
    )
    on_cpu = partial(_in_float32, _winograd_along_width if worthwhile else direct)
    return (
        jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=partial(_to_float32, direct)) + bias[None, None, None]
    )


def upsample_conv2d(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Upsample by 2 (nearest neighbour) and convolve with a 3x3 kernel; arguments and result as in `conv2d`."""
    on_cpu, elsewhere = partial(_in_float32, _upsample_conv_by_phase), partial(_to_float32, _repeat_then_conv)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere) + bias[None, None, None]


def _in_float32(convolve: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve in float32, because CPUs without bfloat16 instructions emulate bfloat16 slowly."""
    return convolve(x.astype(jnp.float32), kernel.astype(jnp.float32))


def _to_float32(convolve: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolve(x, kernel).astype(jnp.float32)


def _direct(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    # Precision HIGHEST keeps TPUs and GPUs from rounding float32 operands to bfloat16 or TF32.
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
    """Compute a 3x3 convolution with F(4, 3) along the width: half the products, for 1.5 times the memory of `x`.

    The two-dimensional variant saves more products, but its fourfold memory costs more than they do.
    """
    batch, height, width, _ = x.shape
    tiles, points = width // _TILE, _TILE + 2
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))  # (B, H, W + 2, I)
    # taps[n] is the n-th of the six inputs of every tile: (B, H, W/4, I).
    taps = [padded[:, :, n : n + _TILE * (tiles - 1) + 1 : _TILE] for n in range(points)]
    columns = jnp.einsum("pj,ijco->pico", _KERNEL_TRANSFORM, kernel, precision="highest")[:, :, None]  # (6, 3, 1, I, O)
    products = [
        _direct(tap, column, stride=1, padding=((1, 1), (0, 0)))
        for tap, column in zip(_combine(_INPUT_TRANSFORM, taps), columns, strict=True)
    ]
    outputs = _combine(_OUTPUT_TRANSFORM, products)
    return jnp.stack(outputs, axis=3).reshape(batch, height, width, kernel.shape[3])


def _combine(matrix: np.ndarray, terms: list[jax.Array]) -> list[jax.Array]:
    """Multiply a small constant matrix with a list of arrays; zeros are skipped."""
    combined = []
    for row in matrix:
        first, *others = [float(m) * term for m, term in zip(row, terms, strict=True) if m]
        combined.append(sum(others, start=first))
    return combined


def _upsample_conv_by_phase(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute upsampling and a 3x3 convolution as four 2x2 convolutions of `x`, one for each parity of the output.

    In the upsampled image, two of the three kernel rows always meet the same row of `x`, so these two are added first.
    This takes 16 products per pixel of `x` instead of 36, and no upsampled image.
    """
    batch, height, width, _ = x.shape
    rows = []
    for i, row_kernel in enumerate(_merge_taps(kernel, axis=0)):
        phases = [
            _direct(x, phase_kernel, stride=1, padding=((1 - i, i), (1 - j, j)))  # (B, H, W, O)
            for j, phase_kernel in enumerate(_merge_taps(row_kernel, axis=1))
        ]
        rows.append(jnp.stack(phases, axis=3))  # (B, H, W, 2, O)
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, kernel.shape[3])


def _merge_taps(kernel: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Merge three taps along an axis into the two that apply at even and at odd positions of the output."""
    first, second, third = jnp.split(kernel, 3, axis=axis)
    even = jnp.concatenate([first, second + third], axis)
    odd = jnp.concatenate([first + second, third], axis)
    return even, odd
