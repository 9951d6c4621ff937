"""Flow maps: jumps from time t to an earlier time r in one evaluation, z_r = z_t - (t - r) u(z_t, t, r).

The average velocity u equals the velocity at r = t. Differentiating (t - r) u = z_t - z_r along the path gives the
identity that training enforces (MeanFlow, arXiv 2505.13447):

    u = v - (t - r) du/dt,    du/dt = v ∂u/∂z + ∂u/∂t,    by one Jacobian-vector product.

The linear path and its velocity v = n - x are those of objective.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import ConfigError
from mpdit_jax.flow.fields import Field
from mpdit_jax.flow.objective import LogitNormal, interpolate
from mpdit_jax.flow.protocols import Average
from mpdit_jax.flow.solvers import Increments, Solution, integrate, prepare
from mpdit_jax.flow.times import TimeGrid
from mpdit_jax.validation import is_real


@dataclasses.dataclass(frozen=True)
class FlowMapSolver:
    """Jump from each time of the grid to the next: `steps` evaluations, one for each jump.

    A flow model that was not trained as a map runs too: with r in its tail it is more accurate than Euler at about
    four steps, and useless at one.

    Attributes:
        churn: a jump to the end time r goes on to (1 - churn) r, and fresh noise brings the latents back to r. 0 is
            deterministic; 1 jumps to the data every time (consistency sampling).
    """

    churn: float = 0.0

    def __post_init__(self) -> None:
        if not is_real(self.churn) or not 0 <= self.churn <= 1:
            raise ConfigError(f"churn={self.churn!r}: expected a number from 0 (no fresh noise) to 1.")

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`."""
        times = grid.times(steps)
        arrivals = (1 - self.churn) * times[1:]
        inputs = (
            prepare(field, times[:-1], z.dtype),
            prepare(field, arrivals, z.dtype),
            jnp.asarray(np.stack([arrivals, *renoise(arrivals, times[1:])], axis=1), z.dtype),  # (steps, 3)
            jnp.arange(steps),
        )

        def step(z: jax.Array, t: jax.Array, t_next: jax.Array, inputs: Any) -> jax.Array:
            start, end, (arrival, signal, noise_std), index = inputs
            z = z + (arrival - t) * field.jump(z, start, end)
            if not self.churn:
                return z
            # The last jump ends at the data and adds no noise.
            return jax.lax.cond(index < steps - 1, lambda: signal * z + noise_std * increments(index), lambda: z)

        return integrate(step, z, times, inputs, steps, record)


def renoise(r: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the factor of z_r and the standard deviation of fresh noise that bring it back from r to t >= r.

    With a = (1 - t) / (1 - r), a z_r has signal 1 - t and noise a r; the fresh noise has variance t² - (a r)².
    """
    signal = (1 - t) / (1 - r)
    return signal, np.sqrt(np.maximum(t**2 - (signal * r) ** 2, 0.0))


JUMP_TIMES = (LogitNormal(0.4, 1.0), LogitNormal(-1.2, 1.0))  # improved MeanFlow's


def draw_jumps(key: jax.Array, count: int, times: tuple[LogitNormal, LogitNormal] = JUMP_TIMES) -> jax.Array:
    """Draw the times of jumps: (count, 2), each row t and r <= t, the larger and the smaller of two draws."""
    first, second = (one.sample(part, count) for one, part in zip(times, jax.random.split(key), strict=True))
    return jnp.stack([jnp.maximum(first, second), jnp.minimum(first, second)], axis=1)


@dataclasses.dataclass(frozen=True)
class FlowMapLoss:
    """The loss of a flow map: half of the examples fit the velocity at r = t, the other half the identity above.

    Examples alternate: rows 0, 2, … are jumps from t to r, rows 1, 3, … have r = t. So no example leaves its device.

    Attributes:
        p: power of the adaptive weight 1 / (error + 0.001)^p of an example; 0 is the plain squared error.
        guidance: g in the guided velocity v + g (v_class - v_null) that the map learns, so that sampling needs one
            pass. It acts as a guidance scale of 1 / (1 - g).
        guidance_until: largest t at which the velocity is guided.

    With guidance scales w as an input of the model, each example has its own g = 1 - 1/w.
    """

    p: float = 1.0
    guidance: float = 0.0
    guidance_until: float = 0.7

    def __call__(
        self,
        model: Average,
        x: jax.Array,
        y: jax.Array,
        t: jax.Array,
        r: jax.Array,
        noise: jax.Array,
        w: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Return the loss, squared errors (B,), and scalars for the log.

        Args:
            model: called as model(z, t, y, r, w), with r = None or w = None for none.
            x: clean latents (B, H, W, C), B even.
            y: labels (B,).
            t: times (B,).
            r: end times (B,); r = t in rows 1, 3, …
            noise: standard normal (B, H, W, C).
            w: guidance scales (B,) of a model that takes them.
        """
        z, v = interpolate(x, noise, t)
        if self.guidance or w is not None:
            null = jnp.full_like(y, model.num_classes)
            difference = jax.lax.stop_gradient(model(z, t, y, None, w) - model(z, t, null, None, w))
            g = self.guidance if w is None else 1 - 1 / w
            scale = jnp.where(t <= self.guidance_until, g, 0.0)[:, None, None, None]
            v = v + scale.astype(v.dtype) * difference
        (z_jump, z_flow), (v_jump, v_flow) = _halves(z), _halves(v)
        (t_jump, t_flow), (y_jump, y_flow), r_jump = _halves(t), _halves(y), _halves(r)[0]
        w_jump, w_flow = (None, None) if w is None else _halves(w)
        u, derivative = jax.jvp(
            lambda z, t: model(z, t, y_jump, r_jump, w_jump), (z_jump, t_jump), (v_jump, jnp.ones_like(t_jump))
        )
        length = (t_jump - r_jump)[:, None, None, None]
        target = jax.lax.stop_gradient(v_jump - length * derivative)
        jump_error = jnp.square(u - target).mean(axis=(1, 2, 3))  # (B / 2,)
        flow_error = jnp.square(model(z_flow, t_flow, y_flow, None, w_flow) - v_flow).mean(axis=(1, 2, 3))  # (B / 2,)
        errors = jnp.stack([jump_error, flow_error], axis=1).reshape(-1)  # (B,)
        weights = jax.lax.stop_gradient(errors + 1e-3) ** -self.p
        metrics = {
            "jump_error": jump_error.mean(),
            "flow_error": flow_error.mean(),
            "time_derivative": jnp.sqrt(jnp.square(derivative).mean(axis=(1, 2, 3))).mean(),
        }
        return (weights * errors).mean(), errors, metrics


FLOW_MAP_METRICS = ("jump_error", "flow_error", "time_derivative")
"""Scalars of `FlowMapLoss` for the log: mean squared errors of both halves, and the RMS of an example's du/dt. The
weighted loss itself stays near 1 (at p = 1) and says little."""


def _halves(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return rows 0, 2, … and rows 1, 3, …"""
    pairs = rows.reshape(rows.shape[0] // 2, 2, *rows.shape[1:])
    return pairs[:, 0], pairs[:, 1]
