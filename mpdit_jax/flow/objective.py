"""The flow-matching objective: the linear path, the distribution of training times, and the loss (paper, section 3)."""

import dataclasses
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpdit_jax.distributed.mesh import with_auto_axes
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.flow.inputs import check_convention, check_labels, is_traced
from mpdit_jax.flow.protocols import ClassConditional, Velocity
from mpdit_jax.validation import range_remedy


class TimeDistribution(Protocol):
    """A distribution of training times."""

    def sample(self, key: jax.Array, count: int) -> jax.Array:
        """Draw `count` times in [0, 1], float32."""


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std n) with n ~ N(0, 1). The paper has mean 0 and std 1."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ConfigError(f"time.std={self.std}: expected a positive number (the paper uses 1.0).")

    def sample(self, key: jax.Array, count: int) -> jax.Array:
        """Draw `count` times in (0, 1), float32."""
        return jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (count,)))


@dataclasses.dataclass(frozen=True)
class Uniform:
    """t uniform in [0, 1)."""

    def sample(self, key: jax.Array, count: int) -> jax.Array:
        """Draw `count` times in [0, 1), float32."""
        return jax.random.uniform(key, (count,))


PAPER_TIMES = LogitNormal()
TIME_DISTRIBUTIONS = {"logit_normal": LogitNormal, "uniform": Uniform}


def time_distribution(name: str, mean: float, std: float) -> TimeDistribution:
    """Build a time distribution by name; `mean` and `std` are those of the logit."""
    return LogitNormal(mean, std) if name == "logit_normal" else TIME_DISTRIBUTIONS[name]()


def interpolate(x: jax.Array, noise: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the point z_t = (1 - t) x + t noise of the path and its velocity noise - x, both (B, H, W, C)."""
    t = t[:, None, None, None]
    return (1 - t) * x + t * noise, noise - x


def flow_matching_loss(
    model: Velocity,
    x: jax.typing.ArrayLike,
    y: jax.typing.ArrayLike,
    *,
    key: jax.Array | None = None,
    t: jax.typing.ArrayLike | None = None,
    noise: jax.typing.ArrayLike | None = None,
    times: TimeDistribution = PAPER_TIMES,
) -> tuple[jax.Array, jax.Array]:
    """Compute the mean squared error between the model's velocity and the path's velocity.

    `t` and `noise` are drawn from `key` unless they are given.

    Args:
        model: called as model(z, t, y).
        x: clean latents (B, H, W, C), float32.
        y: labels (B,), int32.
        key: random key; required unless both `t` and `noise` are given.
        t: times (B,).
        noise: standard normal noise (B, H, W, C).
        times: distribution from which times are drawn.

    Returns:
        The loss, a float32 scalar, and the loss of each example (B,), of which it is the mean.

    Raises:
        InputError: the key is missing, shapes do not match, the model's convention is not "velocity", a label is out of
            range, or `x` has the range of images in 0 to 255. The last two are not seen in traced values.
    """
    check_convention(model)
    if key is None and (t is None or noise is None):
        raise InputError("flow_matching_loss needs key=… unless both t=… and noise=… are given.")
    _check_range(x)
    module, arrays = model if isinstance(model, nnx.Module) else None, (x, y, key, t, noise)

    def loss(module: nnx.Module | None, *arrays: Any) -> tuple[jax.Array, jax.Array]:
        return _loss(model if module is None else cast(Velocity, module), times, *arrays)

    return with_auto_axes(loss, (module,), arrays, batched=(x, y, t, noise), out=(-1, 0))


def _check_range(x: jax.typing.ArrayLike) -> None:
    """Raise InputError for values that are neither images in [-1, 1] nor latents. Traced ones are not known."""
    if is_traced(x) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return
    values = np.asarray(x)
    if values.size and (remedy := range_remedy(float(values.min()), float(values.max()))):
        raise InputError(
            f"x ranges from {values.min()} to {values.max()}: expected [-1, 1] or normalized latents; {remedy}."
        )


def _loss(
    model: Velocity,
    times: TimeDistribution,
    x: jax.typing.ArrayLike,
    y: jax.typing.ArrayLike,
    key: jax.Array | None,
    t: jax.typing.ArrayLike | None,
    noise: jax.typing.ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """Loss and per_example, under automatic axes."""
    x = jnp.asarray(x, jnp.float32)
    if key is not None and (t is None or noise is None):
        time_key, noise_key = jax.random.split(key)
        t = times.sample(time_key, x.shape[0]) if t is None else t
        noise = jax.random.normal(noise_key, x.shape) if noise is None else noise
    t, noise = jnp.asarray(t, jnp.float32), jnp.asarray(noise, jnp.float32)
    y = check_labels(y, model.num_classes) if isinstance(model, ClassConditional) else jnp.asarray(y)
    if noise.shape != x.shape or t.shape != x.shape[:1] or y.shape != x.shape[:1] or x.ndim != 4:
        raise InputError(
            f"x {x.shape}, y {y.shape}, t {t.shape}, noise {noise.shape}: "
            "expected x and noise (B, H, W, C), y and t (B,)."
        )
    z, velocity = interpolate(x, noise, t)
    error = model(z, t, y).astype(jnp.float32) - velocity
    per_example = jnp.square(error).mean(axis=(1, 2, 3))  # (B,)
    return per_example.mean(), per_example
