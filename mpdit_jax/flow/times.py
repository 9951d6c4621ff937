"""Time grids: the times from 1 to 0 at which a fixed-step solver stops."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np

from mpdit_jax.errors import ConfigError
from mpdit_jax.validation import suggest


@runtime_checkable
class TimeGrid(Protocol):
    """A time grid. Hashable, because it is a static argument of jit."""

    def times(self, intervals: int) -> np.ndarray:
        """Return falling times from exactly 1 to exactly 0, float64 (intervals + 1,)."""


@dataclasses.dataclass(frozen=True)
class UniformGrid:
    """Intervals of equal length."""

    def times(self, intervals: int) -> np.ndarray:
        """Return falling times from 1 to 0, float64 (intervals + 1,)."""
        return np.linspace(1.0, 0.0, intervals + 1)


@dataclasses.dataclass(frozen=True)
class ShiftedGrid:
    """t = s u / (1 + (s - 1) u) of uniform u: more points near the noise for s > 1.

    This is the resolution shift of Stable Diffusion 3 (Esser et al. 2024, eq. 23). If the uniform grid suits latents of
    n values, latents of m values take s = √(m / n): 2 for 64x64 against 32x32.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        if not (self.shift > 0 and np.isfinite(self.shift)):
            raise ConfigError(f"time_shift={self.shift!r}: expected a positive number (1.0 is the uniform grid).")

    def times(self, intervals: int) -> np.ndarray:
        """Return falling times from 1 to 0, float64 (intervals + 1,)."""
        u = np.linspace(1.0, 0.0, intervals + 1)
        return self.shift * u / (1 + (self.shift - 1) * u)


@dataclasses.dataclass(frozen=True)
class QuadraticGrid:
    """t = u² of uniform u: more points near the data (DDIM's "quad")."""

    def times(self, intervals: int) -> np.ndarray:
        """Return falling times from 1 to 0, float64 (intervals + 1,)."""
        return np.linspace(1.0, 0.0, intervals + 1) ** 2


TIME_GRIDS: dict[str, TimeGrid] = {"uniform": UniformGrid(), "shifted": ShiftedGrid(), "quadratic": QuadraticGrid()}


def get_time_grid(grid: str | TimeGrid) -> TimeGrid:
    """Return the time grid of that name, or the given grid. Raise ConfigError for an unknown name or another object."""
    if not isinstance(grid, str):
        if not isinstance(grid, TimeGrid) or isinstance(grid, type):
            raise ConfigError(
                f"time_grid={grid!r}: expected one of {', '.join(TIME_GRIDS)}, or an object with their times()."
            )
        return grid
    if grid not in TIME_GRIDS:
        raise ConfigError(
            f"unknown time grid {grid!r}{suggest(grid, TIME_GRIDS)}: expected one of {', '.join(TIME_GRIDS)}."
        )
    return TIME_GRIDS[grid]


def check_times(grid: TimeGrid, intervals: int) -> None:
    """Raise ConfigError unless the grid's times fall from 1 to 0 in `intervals` intervals."""
    times = np.asarray(grid.times(intervals))
    if times.shape != (intervals + 1,) or times[0] != 1 or times[-1] != 0 or not (np.diff(times) < 0).all():
        raise ConfigError(
            f"time_grid={grid!r} gives {times}: expected {intervals + 1} falling times from 1 to 0 for {intervals} "
            "intervals."
        )
