"""Fixed-step solvers of the sampling ODE dz/dt = v(z, t), from noise at t = 1 to data at t = 0.

`steps` counts velocity evaluations. A second-order solver spends two evaluations per interval and so has half as many
intervals; if `steps` is odd, the last interval is an Euler step.
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
"""A function from the step index () to standard normal noise (B, H, W, C)."""


class Solution(NamedTuple):
    """The result of a solver."""

    latents: jax.Array  # (B, H, W, C)
    evaluations: jax.Array  # number of velocity evaluations, int32 (), or (B,) if each example has its own steps
    path_times: jax.Array | None  # falling times from start to end, (n,); None unless recorded
    path: jax.Array | None  # latents at these times, (n, B, H, W, C)


@runtime_checkable
class Solver(Protocol):
    """A solver. Hashable, because it is a static argument of jit."""

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z (B, H, W, C) to data.

        Args:
            field: velocity field.
            z: standard normal noise.
            grid: time grid.
            steps: number of velocity evaluations.
            increments: noise of a stochastic solver's steps.
            record: also return the latents at every time of the grid, or at those that an adaptive solver chose.
        """


@dataclasses.dataclass(frozen=True)
class Euler:
    """z <- z + (t' - t) v(z, t): first order, one evaluation per interval."""

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`."""
        times = grid.times(steps)

        def step(z: jax.Array, t: jax.Array, t_next: jax.Array, prepared: Any) -> jax.Array:
            return z + (t_next - t) * field(z, prepared)

        return integrate(step, z, times, prepare(field, times[:-1], z.dtype), steps, record)


@dataclasses.dataclass(frozen=True)
class Heun:
    """The trapezoidal rule with an Euler predictor: second order, two evaluations per interval."""

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`."""
        times = grid.times(-(-steps // 2))
        prepared = prepare(field, times, z.dtype)
        pairs = _rows(prepared, 0, -1), _rows(prepared, 1, None)

        def step(z: jax.Array, t: jax.Array, t_next: jax.Array, pair: Any) -> jax.Array:
            first = field(z, pair[0])
            second = field(z + (t_next - t) * first, pair[1])
            return z + (t_next - t) * (first + second) / 2

        return _integrate_pairs(field, step, z, times, pairs, steps, record)


@dataclasses.dataclass(frozen=True)
class Midpoint:
    """The explicit midpoint rule: second order, two evaluations per interval."""

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`."""
        times = grid.times(-(-steps // 2))
        pairs = prepare(field, times[:-1], z.dtype), prepare(field, (times[:-1] + times[1:]) / 2, z.dtype)

        def step(z: jax.Array, t: jax.Array, t_next: jax.Array, pair: Any) -> jax.Array:
            middle = z + (t_next - t) / 2 * field(z, pair[0])
            return z + (t_next - t) * field(middle, pair[1])

        return _integrate_pairs(field, step, z, times, pairs, steps, record)


@dataclasses.dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++(2M) (Lu et al. 2022) for a velocity on the linear path; one evaluation per interval.

    With the data prediction D = z - t v, signal 1 - t, noise t and λ = log((1 - t) / t), an interval from t to t' is

        z' = (t' / t) z + ((1 - t') - (1 - t) t' / t) (D + c (D - D_before)),    c = (λ' - λ) / (2 (λ - λ_before)).

    λ is infinite at t = 1 and t = 0, so c = 0, an Euler step, on the first two intervals and the last. The order is 2;
    on a grid from 1 to 0, whose outer intervals stay long in λ, the error falls as log(N) / N².
    """

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`."""
        times = grid.times(steps)
        coefficients = jnp.asarray(self.coefficients(times), z.dtype)  # (steps, 3)
        prepared = prepare(field, times[:-1], z.dtype)

        def step(
            carry: tuple[jax.Array, jax.Array], t: jax.Array, t_next: jax.Array, inputs: Any
        ) -> tuple[jax.Array, jax.Array]:
            (z, data_before), (prepared, (z_factor, data_factor, c)) = carry, inputs
            data = z - t * field(z, prepared)
            return z_factor * z + data_factor * (data + c * (data - data_before)), data

        # The first `data_before` is multiplied by zero.
        return integrate(step, (z, z), times, (prepared, coefficients), steps, record, latents=lambda carry: carry[0])

    @staticmethod
    def coefficients(times: np.ndarray) -> np.ndarray:
        """Return the factor of z, the factor of the data term, and c for every interval: float64 (intervals, 3)."""
        t, t_next = times[:-1], times[1:]
        with np.errstate(divide="ignore", invalid="ignore"):
            h = np.diff(np.log((1 - times) / times))  # (intervals,), infinite at the ends
            c = np.concatenate([[0.0], h[1:] / (2 * h[:-1])])
        c[~np.isfinite(c)] = 0.0
        return np.stack([t_next / t, (1 - t_next) - (1 - t) * t_next / t, c], axis=1)


def prepare(field: Field, times: np.ndarray, dtype: jnp.dtype) -> Any:
    """Prepare times (n,) that the whole batch shares: a pytree with leading axes (n, 1)."""
    return field.prepare(jnp.asarray(times, dtype)[:, None])


def integrate(
    step: Callable[..., Any],
    carry: Any,
    times: np.ndarray,
    inputs: Any,
    evaluations: int,
    record: bool,
    latents: Callable[[Any], jax.Array] = lambda carry: carry,
) -> Solution:
    """Scan `carry = step(carry, t, t_next, inputs)` over the intervals of `times`; `latents` reads z from a carry."""
    t = jnp.asarray(times, latents(carry).dtype)

    def body(carry: Any, interval: Any) -> tuple[Any, jax.Array | None]:
        carry = step(carry, *interval)
        return carry, latents(carry) if record else None

    last, path = jax.lax.scan(body, carry, (t[:-1], t[1:], inputs))
    if path is not None:
        path = jnp.concatenate([latents(carry)[None], path])
    return Solution(latents(last), jnp.int32(evaluations), t if record else None, path)


def _integrate_pairs(
    field: Field, step: Callable[..., jax.Array], z: jax.Array, times: np.ndarray, pairs: Any, steps: int, record: bool
) -> Solution:
    """Integrate `steps // 2` intervals with `step`, and a last one with Euler if `steps` is odd."""
    full = steps // 2
    solution = integrate(step, z, times[: full + 1], _rows(pairs, 0, full), steps, record)
    if steps % 2 == 0:
        return solution
    start, end = jnp.asarray(times[full:], z.dtype)
    latents = solution.latents + (end - start) * field(solution.latents, jax.tree.map(lambda x: x[full], pairs[0]))
    if solution.path is None or solution.path_times is None:
        return solution._replace(latents=latents)
    path_times, path = jnp.append(solution.path_times, end), jnp.concatenate([solution.path, latents[None]])
    return Solution(latents, solution.evaluations, path_times, path)


def _rows(tree: Any, first: int, last: int | None) -> Any:
    return jax.tree.map(lambda leaf: leaf[first:last], tree)
