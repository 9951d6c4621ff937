"""Noise that belongs to an image: a function of (key, the image's number, the step), whatever batch it is drawn in."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.flow.solvers import Increments

NO_IMAGE = np.uint32(2**32 - 1)  # the number that no image has
_IMPLEMENTATION = "threefry2x32"


def seed_key(seed: jax.typing.ArrayLike) -> jax.Array:
    """The key of a seed, the same whatever JAX's default implementation of keys is."""
    return jax.random.key(seed, impl=_IMPLEMENTATION)


def threefry(key: jax.Array) -> jax.Array:
    """The key, or a Threefry key made of one of another implementation, of either kind.

    Mapped over keys, other implementations ("rbg") give an entry numbers that depend on the rest of the batch.
    """
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if jax.random.key_impl(key) == _IMPLEMENTATION:
            return key
        key = jax.random.key_data(key)
    if key.shape == (2,):
        return jax.random.wrap_key_data(key, impl=_IMPLEMENTATION)
    return functools.reduce(jax.random.fold_in, key, seed_key(0))


@partial(jax.jit, static_argnames="shape")
def draw_noise(key: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise float32 (n, *shape) of the images numbered `indices` (n,), by a Threefry key.

    A function of (key, index) alone.
    """
    return jax.vmap(lambda index: _normal(jax.random.fold_in(key, index), shape))(indices)


def noise_increments(key: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> Increments:
    """The noise of a stochastic solver's steps, for the images numbered `indices` (n,), by a Threefry key."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, NO_IMAGE)))(indices)

    def increments(step: jax.Array) -> jax.Array:
        return jax.vmap(lambda image: _normal(jax.random.fold_in(image, step), shape))(keys)

    return increments


class GivenIncrements:
    """Noise read from an array (steps, n, H, W, C).

    Attributes:
        asked: whether a solver has asked for any.
    """

    def __init__(self, values: jax.Array) -> None:
        self._values, self.asked = values, False

    def __call__(self, step: jax.Array) -> jax.Array:
        """That of a step."""
        self.asked = True
        return jnp.take(self._values, step, axis=0)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32)  # also where JAX's default is float64
