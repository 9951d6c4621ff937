"""Adaptive Runge–Kutta solvers from diffrax, with separate step sizes for every image."""

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

METHODS = {"dopri5": "Dopri5", "tsit5": "Tsit5"}  # our names: diffrax's
_STAGES = 6  # evaluations per step; the first of the seven stages is the previous step's last
_FIRST_STAGE = 1  # evaluations before the first step
_FIRST_STEP = 0.01  # length in t of the first step
_FRAMES = 17  # recorded times per segment
_MAX_STEPS = 4096


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """A Runge–Kutta method of order 5 whose step sizes follow an error estimate, separately for each image.

    An image therefore does not depend on the rest of its batch; a batch takes as long as its slowest image. The
    integration is split at the ends of the guidance interval. An image that needs more than 4,096 steps in
    one part becomes NaN.
    """

    method: str = "dopri5"  # "dopri5" (Dormand–Prince) or "tsit5" (Tsitouras)
    rtol: float = 1e-5  # tolerance of a step, relative to the latents
    atol: float = 1e-5  # absolute tolerance of a step

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method={self.method!r}: expected one of {', '.join(METHODS)}.")
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not (is_real(value) and value >= 0 and math.isfinite(value)) or self.rtol == self.atol == 0:
                raise ConfigError(f"{name}={value!r}: expected a small positive number, such as 1e-5.")

    def solve(
        self, field: Field, z: jax.Array, grid: TimeGrid, steps: int, increments: Increments, record: bool = False
    ) -> Solution:
        """Carry noise z to data; see `Solver`. `grid` and `steps` are not used.

        Raise MissingExtraError without diffrax, and InputError inside a `jax.shard_map` with check_vma=True.
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
        """Return the latents at the segment's end, the evaluations (B,), and times and latents of the path.

        Unless `record` is set, the path is the segment's end alone.
        """
        diffrax = _diffrax()
        terms = diffrax.ODETerm(lambda t, z, field: _one_example(t, z, field))
        method = vars(diffrax)[METHODS[self.method]]()
        controller = diffrax.PIDController(rtol=self.rtol, atol=self.atol)
        times = jnp.linspace(segment.start, segment.end, _FRAMES if record else 2, dtype=z.dtype)[1:]

        def integrate(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            solution = diffrax.diffeqsolve(
                terms,
                method,
                # diffrax checks Python floats while tracing, but arrays at run time by a callback to Python, and a
                # program with a callback cannot be exported.
                t0=float(segment.start),
                t1=float(segment.end),
                dt0=-min(_FIRST_STEP, segment.start - segment.end),
                y0=z,
                args=segment.field,
                saveat=diffrax.SaveAt(ts=times) if record else diffrax.SaveAt(t1=True),
                stepsize_controller=controller,
                max_steps=_MAX_STEPS,
                throw=False,
            )
            successful = solution.result == diffrax.RESULTS.successful
            evaluations = _FIRST_STAGE + _STAGES * solution.stats["num_steps"]
            return jnp.where(successful, solution.ys, jnp.nan), evaluations

        try:
            # diffrax computes float times in JAX's default dtype, which must be the dtype of the latents.
            with jax.enable_x64(z.dtype == jnp.float64):
                path, evaluations = jax.vmap(integrate, out_axes=(1, 0))(z)  # (n, B, H, W, C), (B,)
        except TypeError as error:
            # diffrax's loops start from constants, which shard_map's check does not accept in place of varying states.
            if jax.sharding.get_abstract_mesh().manual_axes and "manual axis types" in str(error):
                raise InputError(
                    f"{self.method} runs inside jax.shard_map with check_vma=False only: give it that argument, or "
                    "choose a fixed-step solver."
                ) from error
            raise
        return path[-1], evaluations, times, path


@jax.custom_batching.custom_vmap
def _one_example(t: jax.Array, z: jax.Array, field: Field) -> jax.Array:
    """Return the velocity of one example; under `vmap`, evaluate the field once for the whole batch (`_whole_batch`).

    diffeqsolve always runs under `vmap` here, so this body only provides the shape of the result.
    """
    return z


@_one_example.def_vmap
def _whole_batch(size: int, mapped: Any, t: jax.Array, z: jax.Array, field: Field) -> tuple[jax.Array, bool]:
    times = t if mapped[0] else jnp.broadcast_to(t, (size,))
    prepared = jax.tree.map(lambda leaf: leaf[0], field.prepare(times[None]))
    return field(z if mapped[1] else jnp.broadcast_to(z, (size, *z.shape)), prepared), True


def _diffrax() -> ModuleType:
    try:
        import diffrax
    except ImportError as error:
        raise MissingExtraError(
            f"the adaptive solvers need diffrax: {install_extra('adaptive')}, or choose a fixed-step solver."
        ) from error
    return diffrax
