"""What flow matching needs of a model: its call signature, the shape it works on, and its classes."""

from typing import Any, Protocol, runtime_checkable

import jax


class Velocity(Protocol):
    """A function of latents (B, H, W, C), times (B,) and labels (B,) that gives velocities (B, H, W, C)."""

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array, /) -> jax.Array:
        """Velocity dz/dt at `x`, `t`, for class `y`."""


@runtime_checkable
class ClassConditional(Velocity, Protocol):
    """A velocity that knows its latent shape and its classes."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""

    @property
    def num_classes(self) -> int:
        """Number of classes, and the label of the null class."""


@runtime_checkable
class Factored(ClassConditional, Protocol):
    """A model whose conditioning can be computed apart from its trunk, so that a sampler does it once."""

    def modulation(self, t: jax.Array, /) -> Any:
        """What depends on time alone: a pytree of (B, ...) arrays for times (B,)."""

    def class_embedding(self, y: jax.Array, /) -> Any:
        """What depends on the class alone: a pytree of (B, ...) arrays for labels (B,)."""

    def velocity(self, x: jax.Array, modulation: Any, class_embedding: Any, /) -> jax.Array:
        """The rest. Leaves of `modulation` may have a batch of 1 and are then broadcast."""


@runtime_checkable
class Castable(Protocol):
    """A model that can compute in another dtype."""

    def astype(self, dtype: str, /) -> Any:
        """A copy for inference that computes in "float32" or "bfloat16"."""


@runtime_checkable
class Portable(Protocol):
    """A model whose arithmetic can suit another platform than this machine's."""

    def for_platform(self, platform: str, /) -> Any:
        """The same model for "cpu", "gpu" or "tpu"."""


@runtime_checkable
class DeclaresConvention(Protocol):
    """A model that says which convention its output follows; one that does not say follows ours, "velocity"."""

    @property
    def convention(self) -> str:
        """`"velocity"`: noise minus data, with t = 0 at the data and t = 1 at the noise."""


@runtime_checkable
class Convertible(Factored, Castable, Portable, DeclaresConvention, Protocol):
    """A model that `as_velocity` can convert."""

    @property
    def config(self) -> Any:
        """What it was made of, which `mpdit_jax.count` reads."""

    def check(
        self, x: jax.typing.ArrayLike, t: jax.typing.ArrayLike, y: jax.typing.ArrayLike, /
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The arguments of a call as arrays; raises InputError if they do not fit the model."""
