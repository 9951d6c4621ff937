"""Conversion of SiT and DiT models to velocities of our linear path, so that every sampler runs them.

Our convention is z_t = (1 − t) x + t n with velocity n − x: t = 0 is the data x, t = 1 the noise n.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpdit_jax.errors import InputError
from mpdit_jax.flow.protocols import Convertible, FlowMap

DIFFUSION_STEPS = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02


def as_velocity(model: Convertible) -> nnx.Module:
    """Convert a model of any `model.convention` to a velocity in our convention; a velocity is returned unchanged.

    Raises:
        InputError: `model` does not come from load_torch or create_model.
    """
    if not isinstance(model, nnx.Module) or not isinstance(model, Convertible):
        raise InputError(f"model={type(model).__name__}: expected a model from load_torch or create_model.")
    return {"velocity": lambda model: model, "sit": SiTVelocity, "dit": DiTVelocity}[model.convention](model)


class Converted(nnx.Module):
    """Base of the conversions: wraps a model of another convention and is itself a velocity model."""

    def __init__(self, model: Convertible) -> None:
        self.model = model

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the latents."""
        return self.model.input_shape

    @property
    def num_classes(self) -> int:
        """Number of classes; also the label of the null class."""
        return self.model.num_classes

    @property
    def null_class(self) -> bool:
        """Whether the null class was trained."""
        return bool(self.model.config.null_class)

    @property
    def convention(self) -> str:
        """Convention of the output, "velocity"; `config.convention` is that of the wrapped model."""
        return "velocity"

    @property
    def config(self) -> Any:
        """Config of the wrapped model."""
        return self.model.config

    def __call__(self, x: jax.typing.ArrayLike, t: jax.typing.ArrayLike, y: jax.typing.ArrayLike) -> jax.Array:
        """Return the velocity (B, H, W, C) at latents x (B, H, W, C), times t (B,) and labels y (B,)."""
        x, t, y = self.check(x, t, y)
        return self.velocity(x, self.modulation(t), self.class_embedding(y))

    def check(
        self, x: jax.typing.ArrayLike, t: jax.typing.ArrayLike, y: jax.typing.ArrayLike
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Check the arguments of a call as the wrapped model does."""
        return self.model.check(x, t, y)

    def modulation(self, t: jax.Array) -> Any:
        """Return the modulation of times (B,)."""
        raise NotImplementedError

    def class_embedding(self, y: jax.Array) -> Any:
        """Embed labels (B,)."""
        return self.model.class_embedding(y)

    def velocity(self, x: jax.Array, modulation: Any, class_embedding: Any) -> jax.Array:
        """Return the velocity, given the results of `modulation` and `class_embedding`."""
        raise NotImplementedError

    def astype(self, dtype: str) -> "Converted":
        """Return a copy for inference that computes in "float32" or "bfloat16"."""
        return type(self)(self.model.astype(dtype))

    def for_platform(self, platform: str) -> "Converted":
        """Return the same model with the arithmetic that suits "cpu", "gpu" or "tpu"."""
        return type(self)(self.model.for_platform(platform))


class SiTVelocity(Converted):
    """A SiT as a velocity. SiT's time runs from noise (0) to data (1), and it predicts data minus noise."""

    @property
    def flow_map(self) -> bool:
        """Whether the model was trained as a flow map; published SiTs were not."""
        return self.model.config.flow_map

    def modulation(self, t: jax.Array, r: jax.Array | None = None) -> Any:
        """Return the SiT's modulation at 1 − t, or of the jump from 1 − t to 1 − r."""
        start = self.model.modulation(1 - t)
        return start if r is None else self.jump_modulation(start, self.model.modulation(1 - r))

    def jump_modulation(self, start: Any, end: Any) -> Any:
        """Return the SiT's modulation of jumps, given those of their times."""
        return cast(FlowMap, self.model).jump_modulation(start, end)

    def velocity(self, x: jax.Array, modulation: Any, class_embedding: Any) -> jax.Array:
        """Return the negative of the SiT's velocity."""
        return -self.model.velocity(x, modulation, class_embedding)


class DiTVelocity(Converted):
    r"""A DiT as a velocity. DiT predicts the noise ε of x_k = √ᾱ_k x + √(1 − ᾱ_k) n at steps k = 0 … 999.

    With s(t) = √((1 − t)² + t²), the point z_t / s has the noise level of the step k with
    t / (1 − t) = √((1 − ᾱ_k) / ᾱ_k), because then √ᾱ_k = (1 − t) / s and √(1 − ᾱ_k) = t / s. Fractional steps are
    interpolated in the logarithm of this ratio. With ε the DiT's output at (z_t / s, k), the data are
    x = (z_t − t ε) / (1 − t) and the velocity is ε − x = (ε − z_t) / (1 − t). An Euler step from t to u gives
    (1 − u) x + u ε, which is a deterministic DDIM step.

    Both ends of the path lie outside DiT's steps. Times above 0.9937 (step 999) are treated as 0.9937. Times below
    0.0099 (step 0) are evaluated at step 0, whose noise level is too high for them. For Gaussian data of variance 1 and
    an exact ε, the error is 1 % of the velocity at t = 0, 0.5 % at t = 0.005, and at most 0.002 % from t = 0.01 on
    (test_conventions.py). Euler on the uniform grid evaluates no time below 0.0099 in 100 steps, and two in 250.
    """

    def modulation(self, t: jax.Array) -> Any:
        """Return the DiT's modulation at the step of each time, the times, and the times clipped to DiT's steps."""
        ratios = np.sqrt((1 - _alpha_bars()) / _alpha_bars())  # rising, 0.01 to 157
        clipped = jnp.minimum(t, float(ratios[-1] / (1 + ratios[-1])))
        logarithm = jnp.log(jnp.maximum(clipped, 1e-8) / (1 - clipped))
        step = jnp.interp(logarithm, np.log(ratios).astype(np.float32), np.arange(DIFFUSION_STEPS, dtype=np.float32))
        return self.model.modulation(step), t, clipped

    def velocity(self, x: jax.Array, modulation: Any, class_embedding: Any) -> jax.Array:
        """Return (ε − z) / (1 − t)."""
        inner, t, clipped = modulation
        t, clipped = (times[:, None, None, None] for times in (t, clipped))  # (B, 1, 1, 1)
        unit = x / _path_scale(t)
        noise = self.model.velocity(unit, inner, class_embedding)
        return (noise - unit * _path_scale(clipped)) / (1 - clipped)


def _path_scale(t: jax.Array) -> jax.Array:
    return jnp.sqrt((1 - t) ** 2 + t**2)


def _alpha_bars() -> np.ndarray:
    """Return ᾱ of every step of the linear β schedule, float64 (1000,)."""
    return np.cumprod(1 - np.linspace(FIRST_BETA, LAST_BETA, DIFFUSION_STEPS))
