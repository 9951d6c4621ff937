"""Tiled encoding and decoding of large images: overlapping tiles, blended linearly.

The memory needed depends on the size of a tile. The result differs slightly from the untiled one, because group norms
and attention see one tile at a time.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import ConfigError, InputError


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Settings of tiling. An image that fits into one tile is not cut."""

    size: int = 512  # side of a tile in image pixels
    overlap: int = 128  # minimum overlap of neighbouring tiles in image pixels

    def check(self, factor: int) -> None:
        """Raise ConfigError unless size and overlap are multiples of `factor`, the image pixels per latent pixel."""
        for name, value in (("size", self.size), ("overlap", self.overlap)):
            if value < factor or value % factor:
                raise ConfigError(
                    f"Tiling.{name}={value}: expected a positive multiple of the VAE's downsample factor {factor}."
                )
        if self.overlap >= self.size:
            raise ConfigError(f"Tiling.overlap={self.overlap} must be smaller than Tiling.size={self.size}.")


def tiles(size: int) -> Tiling | None:
    """Return the tiling of `--vae_tile`: tiles of `size` pixels that overlap by a quarter, or None for 0."""
    if size < 0 or size % 32:
        raise InputError(f"--vae_tile={size}: expected a multiple of 32, such as 512, or 0 for whole images.")
    return Tiling(size, size // 4) if size else None


def apply_tiled(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, *, tile: int, overlap: int, units: tuple[int, int]
) -> jax.Array:
    """Apply a function of images to overlapping tiles, one after the other, and blend the results.

    Args:
        function: maps (B, h·in, w·in, C) to (B, h·out, w·out, C2) float32, where `units = (in, out)`.
        x: (B, H·in, W·in, C).
        tile: side of a tile, in units.
        overlap: minimum overlap of neighbouring tiles, in units.
        units: pixels per unit of the input and of the output: (f, 1) to encode, (1, f) to decode.

    Returns:
        (B, H·out, W·out, C2).
    """
    unit_in, unit_out = units
    batch, height, width = x.shape[0], x.shape[1] // unit_in, x.shape[2] // unit_in
    rows, row_weights = _plan(height, tile, overlap, unit_out)
    columns, column_weights = _plan(width, tile, overlap, unit_out)
    if len(rows) == len(columns) == 1:
        return function(x)
    side = (min(tile, height) * unit_in, min(tile, width) * unit_in)
    channels = jax.eval_shape(function, jax.ShapeDtypeStruct((batch, *side, x.shape[3]), x.dtype)).shape[3]

    def add_tile(total: jax.Array, place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        row, column = place
        top, left = jnp.asarray(rows)[row], jnp.asarray(columns)[column]
        piece = jax.lax.dynamic_slice(x, (0, top * unit_in, left * unit_in, 0), (batch, *side, x.shape[3]))
        of_row, of_column = jnp.asarray(row_weights)[row], jnp.asarray(column_weights)[column]
        result = function(piece) * (of_row[None, :, None, None] * of_column[None, None, :, None])
        corner = (0, top * unit_out, left * unit_out, 0)
        before = jax.lax.dynamic_slice(total, corner, result.shape)
        return jax.lax.dynamic_update_slice(total, before + result, corner), None

    grid = np.meshgrid(np.arange(len(rows)), np.arange(len(columns)), indexing="ij")
    places = (jnp.asarray(grid[0].ravel()), jnp.asarray(grid[1].ravel()))
    empty = jnp.zeros((batch, height * unit_out, width * unit_out, channels), jnp.float32)
    return jax.lax.scan(add_tile, empty, places)[0]


def _plan(length: int, tile: int, overlap: int, unit_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts of the tiles along one axis, in units, and each tile's weights at its output pixels.

    At every output pixel, the weights of the tiles that cover it sum to 1.
    """
    tile = min(tile, length)
    count = 1 if length == tile else math.ceil((length - overlap) / (tile - overlap))
    starts = np.linspace(0, length - tile, count).round().astype(np.int32)
    pixels = np.arange(tile * unit_out) + 0.5
    ramp = np.minimum(1.0, np.minimum(pixels, pixels[::-1]) / (overlap * unit_out))
    total = np.zeros(length * unit_out)
    for start in starts:
        total[start * unit_out : (start + tile) * unit_out] += ramp
    weights = [ramp / total[start * unit_out : (start + tile) * unit_out] for start in starts]
    return starts, np.stack(weights).astype(np.float32)
