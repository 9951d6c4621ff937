"""Adaptive Runge–Kutta solvers, by diffrax: they choose their own steps, for every image by itself."""

import dataclasses
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from mpdit_jax.errors import ConfigError, InputError, MissingExtraError, install_extra
from mpdit_jax.flow.fields import Field, Segment
from mpdit_jax.flow.solvers import Increments, Solution
from mpdit_jax.flow.times import TimeGrid
from mpdit_jax.validation import is_real

METHODS = {"dopri5": "Dopri5", "tsit5": "Tsit5"}  # ours to diffrax's
_STAGES = 6  # new evaluations a step: both methods have seven stages, the first of which is the step before's last
_START = 1  # evaluations before the first step: its first stage
_FIRST_STEP = 0.01  # of time; the controller takes over from there
_FRAMES = 17  # recorded times a segment
_LIMIT = 4096  # steps, after which the tolerance is out of reach


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Runge–Kutta of order 5 with step sizes chosen from an error estimate, each example its own.

    Image i therefore does not depend on what else is in its batch; a batch takes as long as its slowest image. The
    guidance interval splits the integration, so that no step straddles its ends. An image whose tolerance cannot be
    met in 4,096 steps comes out as NaN.

    Attributes:
        method: "dopri5" (Dormand–Prince) or "tsit5" (Tsitouras).
        rtol: error allowed a step, relative to the latents.
        atol: error allowed a step, absolute.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method={self.method!r}: expected one of {', '.join(METHODS)}.")
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not (is_real(value) and value >= 0 and math.isfinite(value)) or self.rtol == self.atol == 0:
                raise ConfigError(f"{name}={value!r}: expected a small positive number, such as 1e-5.")

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`. `grid` and `steps` are for fixed-step solvers.

        Raises:
            MissingExtraError: diffrax is not installed.
            InputError: inside a `jax.shard_map` that checks over which axes values vary.
        """
        evaluations = jnp.zeros(z.shape[0], jnp.int32)
        times, paths = [jnp.ones(1, z.dtype)], [z[None]]
        for segment in field.segments(1.0, 0.0):
            z, count, segment_times, path = self._integrate(segment, z, record)
            evaluations = evaluations + count
            times.append(segment_times)
            paths.append(path)
        if not record:
            return Solution(z, evaluations, None, None)
        return Solution(z, evaluations, jnp.concatenate(times), jnp.concatenate(paths))

    def _integrate(
        self, segment: Segment, z: jax.Array, record: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Latents at the segment's end, evaluations (B,), and the recorded times and path (the end alone if not)."""
        diffrax = _diffrax()
        terms = diffrax.ODETerm(lambda t, z, field: _one_example(t, z, field))
        method = vars(diffrax)[METHODS[self.method]]()
        controller = diffrax.PIDController(rtol=self.rtol, atol=self.atol)
        times = jnp.linspace(segment.start, segment.end, _FRAMES if record else 2, dtype=z.dtype)[1:]

        def integrate(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = diffrax.diffeqsolve(
                terms,
                method,
                # Plain numbers: diffrax checks them while tracing. Arrays it would check when the program runs, by a
                # callback to Python, and such a program cannot be exported.
                t0=float(segment.start),
                t1=float(segment.end),
                dt0=-min(_FIRST_STEP, segment.start - segment.end),
                y0=z,
                args=segment.field,
                saveat=diffrax.SaveAt(ts=times) if record else diffrax.SaveAt(t1=True),
                stepsize_controller=controller,
                max_steps=_LIMIT,
                throw=False,
            )
            reached = found.result == diffrax.RESULTS.successful
            return jnp.where(reached, found.ys, jnp.nan), _START + _STAGES * found.stats["num_steps"]

        try:
            with jax.enable_x64(z.dtype == jnp.float64):  # diffrax takes plain times for JAX's default: the latents'
                path, evaluations = jax.vmap(integrate, out_axes=(1, 0))(z)  # (n, B, H, W, C), (B,)
        except TypeError as error:
            # diffrax's loops start from constants, which vary over no axis as the states that follow them do.
            if jax.sharding.get_abstract_mesh().manual_axes and "manual axis types" in str(error):
                raise InputError(
                    f"{self.method} runs inside jax.shard_map with check_vma=False only: give it that argument, or "
                    "choose a fixed-step solver."
                ) from error
            raise
        return path[-1], evaluations, times, path


@jax.custom_batching.custom_vmap
def _one_example(t: jax.Array, z: jax.Array, field: Field) -> jax.Array:
    """The velocity of one example of a batch; mapped over the batch, one evaluation of it all.

    diffeqsolve is always mapped over the batch here, so what this body gives has the shape and is never used.
    """
    return z


@_one_example.def_vmap
def _whole_batch(size: int, mapped: Any, t: jax.Array, z: jax.Array, field: Field) -> tuple[jax.Array, bool]:
    times = t if mapped[0] else jnp.broadcast_to(t, (size,))
    point = jax.tree.map(lambda leaf: leaf[0], field.prepare(times[None]))
    return field(z if mapped[1] else jnp.broadcast_to(z, (size, *z.shape)), point), True


def _diffrax() -> ModuleType:
    try:
        import diffrax
    except ImportError as error:
        raise MissingExtraError(
            f"the adaptive solvers need diffrax: {install_extra('adaptive')}, or choose a fixed-step solver."
        ) from error
    return diffrax
