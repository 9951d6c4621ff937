"""Euler–Maruyama for the SDE with the same marginal densities as the ODE (Ma et al. 2024, SiT)."""

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

# The diffusion coefficient w(t), given t and `norm`.
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

    The score is s = -((1 - t) v + z) / t. The solver runs from `start` to `end`, between which the score and SBDM's w
    are finite, and then takes one step without noise from `end` to 0. Every step costs one evaluation.

    Attributes:
        diffusion: the form of w(t): "constant" 1, "SBDM" t / (1 - t), "sigma" t, "decreasing" (from noise to data)
            (1 - cos πt)² / 4, "increasing-decreasing" sin² πt.
        norm: factor of w; in "decreasing", factor of the cosine.
        start: first time.
        end: last time at which noise is added.
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
        noise_std = np.append(np.sqrt(2 * weights[:-1] * -np.diff(times[:-1])), 0.0)  # the last step adds no noise
        coefficients = jnp.asarray(np.stack([weights, noise_std], 1), z.dtype)
        inputs = prepare(field, times[:-1], z.dtype), coefficients, jnp.arange(steps)

        def step(z: jax.Array, t: jax.Array, t_next: jax.Array, inputs: Any) -> jax.Array:
            prepared, (weight, noise_std), index = inputs
            velocity = field(z, prepared)
            score = -((1 - t) * velocity + z) / t
            z = z + (t_next - t) * (velocity - weight * score)
            return jax.lax.cond(index < steps - 1, lambda: z + noise_std * increments(index), lambda: z)

        return integrate(step, z, times, inputs, steps, record)

    def times(self, grid: TimeGrid, steps: int) -> np.ndarray:
        """Return the times of the `steps` evaluations, from `start` to `end`: float64 (steps,)."""
        if steps == 1:
            return np.array([self.start])
        return self.end + (self.start - self.end) * grid.times(steps - 1)
