"""Solvers of the sampling ODE dz/dt = v(z, t), from noise at t = 1 to data at t = 0.

`steps` counts velocity evaluations in every fixed-step solver: 250 means 250. A second-order solver spends two on an
interval, so it crosses half as many; when `steps` is odd its last interval is an Euler step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.flow.fields import Field
from mpdit_jax.flow.times import TimeGrid

Increments: TypeAlias = Callable[[jax.Array], jax.Array]
"""Step number () to standard normal noise (B, H, W, C)."""


class Solution(NamedTuple):
    """What a solver found."""

    latents: jax.Array  # (B, H, W, C)
    evaluations: jax.Array  # velocity evaluations, int32: () or, where each example has its own steps, (B,)
    path_times: jax.Array | None  # (n,) falling, from the start to the end; None unless recorded
    path: jax.Array | None  # latents at those times (n, B, H, W, C)


@runtime_checkable
class Solver(Protocol):
    """A solver. Hashable, so that it is a static argument of jit."""

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z (B, H, W, C) to data.

        Args:
            field: the velocity.
            z: standard normal noise.
            grid: where to stop on the way.
            steps: velocity evaluations to spend.
            increments: the noise of a stochastic solver; others do not call it.
            record: keep the latents of every time on the way.
        """


@dataclasses.dataclass(frozen=True)
class Euler:
    """z <- z + (t' - t) v(z, t): first order, one evaluation an interval."""

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`."""
        times = grid.times(steps)

        def step(z: jax.Array, t: jax.Array, t_next: jax.Array, point: Any) -> jax.Array:
            return z + (t_next - t) * field(z, point)

        return integrate(step, z, times, prepare(field, times[:-1], z.dtype), steps, record)


@dataclasses.dataclass(frozen=True)
class Heun:
    """Euler to t', then again with the mean of both velocities: second order, two evaluations an interval."""

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`."""
        times = grid.times(-(-steps // 2))
        points = prepare(field, times, z.dtype)

        def step(z: jax.Array, t: jax.Array, t_next: jax.Array, point: Any) -> jax.Array:
            first = field(z, point[0])
            second = field(z + (t_next - t) * first, point[1])
            return z + (t_next - t) * (first + second) / 2

        return _march_pairs(field, step, z, times, (_rows(points, 0, -1), _rows(points, 1, None)), steps, record)


@dataclasses.dataclass(frozen=True)
class Midpoint:
    """Euler to the middle, then the whole way with its velocity: second order, two evaluations an interval."""

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`."""
        times = grid.times(-(-steps // 2))
        points = prepare(field, times[:-1], z.dtype), prepare(field, (times[:-1] + times[1:]) / 2, z.dtype)

        def step(z: jax.Array, t: jax.Array, t_next: jax.Array, point: Any) -> jax.Array:
            middle = z + (t_next - t) / 2 * field(z, point[0])
            return z + (t_next - t) * field(middle, point[1])

        return _march_pairs(field, step, z, times, points, steps, record)


@dataclasses.dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++(2M) (Lu et al. 2022) for a velocity on the linear path; one evaluation an interval.

    With the data prediction D = z - t v, signal 1 - t, noise t and λ = log((1 - t) / t), an interval from t to t' is

        z' = (t' / t) z + ((1 - t') - (1 - t) t' / t) (D + c (D - D_before)),    c = (λ' - λ) / (2 (λ - λ_before)).

    λ is infinite at t = 1 and t = 0; the intervals whose c it would spoil (the first two and the last) take c = 0, an
    Euler step. The order is 2, and from 1 to 0, where the outer intervals stay long in λ, the error falls as
    log(N) / N².
    """

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`."""
        times = grid.times(steps)
        coefficients = jnp.asarray(self.coefficients(times), z.dtype)  # (steps, 3)
        points = prepare(field, times[:-1], z.dtype)

        def step(
            carry: tuple[jax.Array, jax.Array], t: jax.Array, t_next: jax.Array, point: Any
        ) -> tuple[jax.Array, jax.Array]:
            (z, before), (keep, add, more) = carry, point[1]
            data = z - t * field(z, point[0])
            return keep * z + add * (data + more * (data - before)), data

        # The first `before` is multiplied by zero.
        return integrate(step, (z, z), times, (points, coefficients), steps, record, of=lambda carry: carry[0])

    @staticmethod
    def coefficients(times: np.ndarray) -> np.ndarray:
        """What z, the data prediction and its extrapolation are multiplied by: float64 (intervals, 3)."""
        t, t_next = times[:-1], times[1:]
        with np.errstate(divide="ignore", invalid="ignore"):
            h = np.diff(np.log((1 - times) / times))  # (intervals,), infinite at the ends
            more = np.concatenate([[0.0], h[1:] / (2 * h[:-1])])
        more[~np.isfinite(more)] = 0.0
        return np.stack([t_next / t, (1 - t_next) - (1 - t) * t_next / t, more], axis=1)


def prepare(field: Field, times: np.ndarray, dtype: jnp.dtype) -> Any:
    """The field's points for the times (n,) of a whole batch, with leading axes (n, 1)."""
    return field.prepare(jnp.asarray(times, dtype)[:, None])


def integrate(
    step: Callable[..., Any],
    carry: Any,
    times: np.ndarray,
    points: Any,
    evaluations: int,
    record: bool,
    of: Callable[[Any], jax.Array] = lambda carry: carry,
) -> Solution:
    """Scan `carry = step(carry, t, t_next, point)` over the intervals of `times`; `of(carry)` are the latents."""
    t = jnp.asarray(times, of(carry).dtype)

    def body(carry: Any, interval: Any) -> tuple[Any, jax.Array | None]:
        carry = step(carry, *interval)
        return carry, of(carry) if record else None

    last, path = jax.lax.scan(body, carry, (t[:-1], t[1:], points))
    if path is not None:
        path = jnp.concatenate([of(carry)[None], path])
    return Solution(of(last), jnp.int32(evaluations), t if record else None, path)


def _march_pairs(
    field: Field, step: Callable[..., jax.Array], z: jax.Array, times: np.ndarray, points: Any, steps: int, record: bool
) -> Solution:
    """`steps // 2` intervals by `step`; a last one by Euler when `steps` is odd."""
    full = steps // 2
    solution = integrate(step, z, times[: full + 1], _rows(points, 0, full), steps, record)
    if steps % 2 == 0:
        return solution
    start, end = jnp.asarray(times[full:], z.dtype)
    latents = solution.latents + (end - start) * field(solution.latents, jax.tree.map(lambda x: x[full], points[0]))
    if solution.path is None or solution.path_times is None:
        return solution._replace(latents=latents)
    path_times, path = jnp.append(solution.path_times, end), jnp.concatenate([solution.path, latents[None]])
    return Solution(latents, solution.evaluations, path_times, path)


def _rows(points: Any, first: int, last: int | None) -> Any:
    return jax.tree.map(lambda leaf: leaf[first:last], points)
