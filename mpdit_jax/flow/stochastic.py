"""Sampling by the stochastic equation that has the same densities as the ODE (Ma et al. 2024, SiT)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import ConfigError
from mpdit_jax.flow.fields import Field
from mpdit_jax.flow.solvers import Increments, Solution, integrate, prepare
from mpdit_jax.flow.times import TimeGrid
from mpdit_jax.validation import is_real, suggest

# How strong the noise is at time t: w(t) over `norm`, or with `norm` inside where its form has one.
DIFFUSIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "constant": lambda t, norm: np.full_like(t, norm),
    "SBDM": lambda t, norm: norm * t / (1 - t),
    "sigma": lambda t, norm: norm * t,
    "decreasing": lambda t, norm: 0.25 * (1 - norm * np.cos(np.pi * t)) ** 2,
    "increasing-decreasing": lambda t, norm: norm * np.sin(np.pi * t) ** 2,
}


@dataclasses.dataclass(frozen=True)
class EulerMaruyama:
    """Euler–Maruyama for dz = (v - w(t) s) dt + sqrt(2 w(t)) dW, backwards in time.

    The score is s = -((1 - t) v + z) / t. It runs from `start` to `end`, where score and SBDM's w are finite, and then
    takes one step without noise from `end` to 0. One evaluation a step, that last one included.

    Attributes:
        diffusion: the form of w(t): "constant", "SBDM" t / (1 - t), "sigma" t, "decreasing" (from noise to data)
            (1 - cos πt)² / 4, "increasing-decreasing" sin² πt.
        norm: a factor on w; inside the square, on the cosine, in "decreasing".
        start: the first time.
        end: the last time with noise.
    """

    diffusion: str = "sigma"
    norm: float = 1.0
    start: float = 0.96
    end: float = 0.04

    def __post_init__(self) -> None:
        if self.diffusion not in DIFFUSIONS:
            raise ConfigError(
                f"diffusion={self.diffusion!r}{suggest(str(self.diffusion), DIFFUSIONS)}: "
                f"expected one of {', '.join(DIFFUSIONS)}."
            )
        for name, value in (("diffusion_norm", self.norm), ("start", self.start), ("end", self.end)):
            if not is_real(value):
                raise ConfigError(f"{name}={value!r}: expected a number.")
        if not (self.norm >= 0 and np.isfinite(self.norm)):
            raise ConfigError(f"diffusion_norm={self.norm!r}: expected 0 or more (1.0 is usual).")
        if not 0 < self.end < self.start < 1:
            raise ConfigError(f"start={self.start!r}, end={self.end!r}: expected 0 < end < start < 1.")

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`."""
        times = np.append(self.times(grid, steps), 0.0)  # (steps + 1,)
        weights = DIFFUSIONS[self.diffusion](times[:-1], self.norm)
        # Noise that a step adds; none in the last one.
        spread = np.append(np.sqrt(2 * weights[:-1] * -np.diff(times[:-1])), 0.0)
        numbers = jnp.arange(steps)
        points = prepare(field, times[:-1], z.dtype), jnp.asarray(np.stack([weights, spread], 1), z.dtype), numbers

        def step(z: jax.Array, t: jax.Array, t_next: jax.Array, point: Any) -> jax.Array:
            point, (weight, spread), number = point
            velocity = field(z, point)
            score = -((1 - t) * velocity + z) / t
            z = z + (t_next - t) * (velocity - weight * score)
            return jax.lax.cond(number < steps - 1, lambda: z + spread * increments(number), lambda: z)

        return integrate(step, z, times, points, steps, record)

    def times(self, grid: TimeGrid, steps: int) -> np.ndarray:
        """Times of the `steps` evaluations, from `start` to `end`: float64 (steps,)."""
        if steps == 1:
            return np.array([self.start])
        return self.end + (self.start - self.end) * grid.times(steps - 1)
