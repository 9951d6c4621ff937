"""Protocols of the models that the loss and the samplers accept."""

from typing import Any, Protocol, runtime_checkable

import jax


class Velocity(Protocol):
    """A function of latents (B, H, W, C), times (B,) and labels (B,) that gives velocities (B, H, W, C)."""

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array, /) -> jax.Array:
        """Return the velocity dz/dt at `x` and `t` for class `y`."""


@runtime_checkable
class ClassConditional(Velocity, Protocol):
    """A velocity model with a latent shape and a number of classes."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the latents."""

    @property
    def num_classes(self) -> int:
        """Number of classes; also the label of the null class."""


class Average(ClassConditional, Protocol):
    """A model that also returns the average velocity from t to an earlier time r."""

    def __call__(
        self, x: jax.Array, t: jax.Array, y: jax.Array, r: jax.Array | None = None, w: jax.Array | None = None, /
    ) -> jax.Array:
        """Return the average velocity from t to r, or the velocity at t without r; `w` are guidance scales (B,)."""


@runtime_checkable
class Factored(ClassConditional, Protocol):
    """A model that computes its conditioning separately, so that a sampler does so once."""

    def modulation(self, t: jax.Array, /) -> Any:
        """Return the modulation of times (B,): a pytree of (B, ...) arrays."""

    def class_embedding(self, y: jax.Array, /) -> Any:
        """Embed labels (B,): a pytree of (B, ...) arrays."""

    def velocity(self, x: jax.Array, modulation: Any, class_embedding: Any, /) -> jax.Array:
        """Return the velocity at `x`. Leaves of `modulation` with a batch of 1 are broadcast."""


@runtime_checkable
class FlowMap(Factored, Protocol):
    """A model that also gives the average velocity from time t to an earlier time r."""

    @property
    def flow_map(self) -> bool:
        """Whether the model was trained as a flow map."""

    def modulation(self, t: jax.Array, r: jax.Array | None = None, /) -> Any:
        """Return the modulation of times t (B,), or of jumps from t to r (B,)."""

    def jump_modulation(self, start: Any, end: Any, /) -> Any:
        """Return the modulation of jumps, given those of their times t and r."""


@runtime_checkable
class GuidedMap(FlowMap, Protocol):
    """A flow map that can take the guidance scale as an input, so that guidance needs one pass."""

    @property
    def guidance_max(self) -> float:
        """Largest scale that the model was trained with; 1 if it takes none."""

    def modulation(self, t: jax.Array, r: jax.Array | None = None, w: jax.Array | None = None, /) -> Any:
        """Return the modulation of times t (B,), or of jumps from t to r (B,), at guidance scales w (B,)."""


@runtime_checkable
class Castable(Protocol):
    """A model that can compute in another dtype."""

    def astype(self, dtype: str, /) -> Any:
        """Return a copy for inference that computes in "float32" or "bfloat16"."""


@runtime_checkable
class Portable(Protocol):
    """A model that can choose its arithmetic for another platform than this machine's."""

    def for_platform(self, platform: str, /) -> Any:
        """Return the same model for "cpu", "gpu" or "tpu"."""


@runtime_checkable
class DeclaresConvention(Protocol):
    """A model that declares the convention of its output. Without a declaration it is assumed to be the velocity."""

    @property
    def convention(self) -> str:
        """The convention; "velocity" is noise minus data, with t = 0 at the data and t = 1 at the noise."""


@runtime_checkable
class DeclaresNullClass(Protocol):
    """A model that declares whether its null class was trained. Of others that is assumed."""

    @property
    def null_class(self) -> bool:
        """Whether label `num_classes` was trained, so that guidance by it makes sense."""


@runtime_checkable
class Convertible(Factored, Castable, Portable, DeclaresConvention, Protocol):
    """A model that `as_velocity` can convert."""

    @property
    def config(self) -> Any:
        """The model's config, which `mpdit_jax.count` reads."""

    def check(
        self, x: jax.typing.ArrayLike, t: jax.typing.ArrayLike, y: jax.typing.ArrayLike, /
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the arguments of a call as arrays. Raise InputError if they do not fit the model."""
