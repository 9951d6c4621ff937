"""Models trained by other conventions as velocities of the linear path, so that every sampler here runs them.

Ours: z_t = (1 − t) x + t n, velocity n − x, t = 0 at the data x and t = 1 at the noise n.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpdit_jax.errors import InputError
from mpdit_jax.flow.protocols import Convertible

DIFFUSION_STEPS = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02


def as_velocity(model: Convertible) -> nnx.Module:
    """The model as a velocity of our convention, by `model.convention`; returned as it is if it is one already.

    Raises:
        InputError: not a model that declares a convention, as those of load_torch and create_model do.
    """
    if not isinstance(model, nnx.Module) or not isinstance(model, Convertible):
        raise InputError(f"model={type(model).__name__}: expected a model from load_torch or create_model.")
    return {"velocity": lambda found: found, "sit": SiTVelocity, "dit": DiTVelocity}[model.convention](model)


class Converted(nnx.Module):
    """What the conversions share: a model inside, called as models are; itself a velocity."""

    def __init__(self, model: Convertible) -> None:
        self.model = model

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the latents."""
        return self.model.input_shape

    @property
    def num_classes(self) -> int:
        """Number of classes; as a label, the null class."""
        return self.model.num_classes

    @property
    def convention(self) -> str:
        """That of the output: "velocity"; the config's is that of the model inside."""
        return "velocity"

    @property
    def config(self) -> Any:
        """The config of the model inside."""
        return self.model.config

    def __call__(self, x: jax.typing.ArrayLike, t: jax.typing.ArrayLike, y: jax.typing.ArrayLike) -> jax.Array:
        """Velocity (B, H, W, C) at latents x (B, H, W, C), times (B,), labels (B,).

        Raises:
            InputError: as the model inside.
        """
        x, t, y = self.check(x, t, y)
        return self.velocity(x, self.modulation(t), self.class_embedding(y))

    def check(
        self, x: jax.typing.ArrayLike, t: jax.typing.ArrayLike, y: jax.typing.ArrayLike
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As the model inside."""
        return self.model.check(x, t, y)

    def modulation(self, t: jax.Array) -> Any:
        """What depends on times (B,) alone."""
        raise NotImplementedError

    def class_embedding(self, y: jax.Array) -> Any:
        """What depends on labels (B,) alone."""
        return self.model.class_embedding(y)

    def velocity(self, x: jax.Array, modulation: Any, class_embedding: Any) -> jax.Array:
        """The rest."""
        raise NotImplementedError

    def astype(self, dtype: str) -> "Converted":
        """A copy for inference that computes in "float32" or "bfloat16"."""
        return type(self)(self.model.astype(dtype))

    def for_platform(self, platform: str) -> "Converted":
        """The same model with the arithmetic that suits "cpu", "gpu" or "tpu"."""
        return type(self)(self.model.for_platform(platform))


class SiTVelocity(Converted):
    """SiT's time runs from the noise at 0 to the data at 1, and its velocity is data minus noise."""

    def modulation(self, t: jax.Array) -> Any:
        """The model's at 1 − t."""
        return self.model.modulation(1 - t)

    def velocity(self, x: jax.Array, modulation: Any, class_embedding: Any) -> jax.Array:
        """The model's with its sign changed."""
        return -self.model.velocity(x, modulation, class_embedding)


class DiTVelocity(Converted):
    r"""DiT predicts the noise ε of x_k = √ᾱ_k x + √(1 − ᾱ_k) n at steps k = 0 … 999 of a linear β schedule.

    A point z_t of the linear path, divided by s(t) = √((1 − t)² + t²), has the noise level of the step k with
    t / (1 − t) = √((1 − ᾱ_k) / ᾱ_k), since then √ᾱ_k = (1 − t) / s and √(1 − ᾱ_k) = t / s. Steps between the whole ones
    are interpolated in the logarithm of that ratio. With ε the model's answer at (z_t / s, k), the data are
    x = (z_t − t ε) / (1 − t) and the velocity is ε − x = (ε − z_t) / (1 − t). A step of Euler with it from t to u gives
    (1 − u) x + u ε, which is a deterministic DDIM step.

    The last step still holds a little of the data (t = 0.9937), and the pure noise of t = 1 is treated as lying there.
    The first step already holds a little noise (t = 0.0099), and DiT knows no cleaner one: for smaller t it is asked at
    step 0 all the same, as of a latent that is noisier than this one, and the velocity is off by at most what ε is. Of
    data that are Gaussian with variance 1 and an exact ε, that is 0.5 % of the velocity at t = 0.005 and 1 % at t = 0,
    against 0.002 % at t = 0.01 and less above (test_conventions.py). Euler in up to 100 even steps evaluates no such t;
    in 250, the last two are such.
    """

    def modulation(self, t: jax.Array) -> Any:
        """The model's at the step of each time, and the times, (B,) each."""
        ratios = np.sqrt((1 - _alpha_bars()) / _alpha_bars())  # rising, 0.01 to 157
        inside = jnp.minimum(t, float(ratios[-1] / (1 + ratios[-1])))
        logarithm = jnp.log(jnp.maximum(inside, 1e-8) / (1 - inside))
        step = jnp.interp(logarithm, np.log(ratios).astype(np.float32), np.arange(DIFFUSION_STEPS, dtype=np.float32))
        return self.model.modulation(step), t, inside

    def velocity(self, x: jax.Array, modulation: Any, class_embedding: Any) -> jax.Array:
        """(ε − z) / (1 − t)."""
        inner, t, inside = modulation
        t, inside = (times[:, None, None, None] for times in (t, inside))  # (B, 1, 1, 1)
        unit = x / _spread(t)
        noise = self.model.velocity(unit, inner, class_embedding)
        return (noise - unit * _spread(inside)) / (1 - inside)


def _spread(t: jax.Array) -> jax.Array:
    return jnp.sqrt((1 - t) ** 2 + t**2)


def _alpha_bars() -> np.ndarray:
    """ᾱ of every step, float64 (1000,)."""
    return np.cumprod(1 - np.linspace(FIRST_BETA, LAST_BETA, DIFFUSION_STEPS))
