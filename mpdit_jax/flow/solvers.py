"""Solvers of the sampling ODE dz/dt = v(z, t), from noise at t = 1 to data at t = 0."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp

from mpdit_jax.errors import ConfigError
from mpdit_jax.model.config import suggest

VelocityField: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""Latents (B, H, W, C) and a scalar time to velocities (B, H, W, C)."""


class Solver(Protocol):
    """A fixed-step solver. Hashable, so that it is a static argument of jit."""

    def solve(self, field: VelocityField, z: jax.Array, times: jax.Array) -> jax.Array:
        """Carry z from times[0] to times[-1] through every point of `times`, float32 (steps + 1,)."""


@dataclasses.dataclass(frozen=True)
class Euler:
    """z <- z + (t' - t) v(z, t): first order, one evaluation a step."""

    def solve(self, field: VelocityField, z: jax.Array, times: jax.Array) -> jax.Array:
        """Carry z from times[0] to times[-1]; one evaluation an interval."""

        def step(z: jax.Array, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            t, t_next = interval
            return z + (t_next - t) * field(z, t), None

        return jax.lax.scan(step, z, (times[:-1], times[1:]))[0]


SOLVERS: dict[str, Solver] = {"euler": Euler()}


def find_solver(solver: str | Solver) -> Solver:
    """A solver by name, or the object itself.

    Raises:
        ConfigError: unknown name.
    """
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}{suggest(solver, SOLVERS)}: expected one of {', '.join(SOLVERS)}.")
    return SOLVERS[solver]


def uniform_times(steps: int) -> jax.Array:
    """`steps` equal intervals from 1 to 0: float32 (steps + 1,)."""
    return jnp.linspace(1.0, 0.0, steps + 1, dtype=jnp.float32)
