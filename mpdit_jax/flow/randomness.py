"""Noise as a function of (key, image index, step), independent of the batch in which an image is drawn."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.flow.solvers import Increments

NO_IMAGE = np.uint32(2**32 - 1)  # an index that no image has
_IMPLEMENTATION = "threefry2x32"


def seed_key(seed: jax.typing.ArrayLike) -> jax.Array:
    """Make the Threefry key of a seed, whatever JAX's default implementation of keys is."""
    return jax.random.key(seed, impl=_IMPLEMENTATION)


def threefry(key: jax.Array) -> jax.Array:
    """Return the key if it is a Threefry key, else a Threefry key derived from it; typed and raw keys are accepted.

    Under `vmap` over keys, an implementation such as "rbg" draws numbers that depend on the rest of the batch.
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
    """Draw standard normal noise float32 (n, *shape) for the image indices (n,); `key` is a Threefry key."""
    return jax.vmap(lambda index: _normal(jax.random.fold_in(key, index), shape))(indices)


def noise_increments(key: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> Increments:
    """Return the function that draws the noise of a step for the image indices (n,); `key` is a Threefry key."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, NO_IMAGE)))(indices)

    def increments(step: jax.Array) -> jax.Array:
        return jax.vmap(lambda image: _normal(jax.random.fold_in(image, step), shape))(keys)

    return increments


class GivenIncrements:
    """Noise of a stochastic solver, read from an array (steps, n, H, W, C); `used` tells whether it was read."""

    def __init__(self, values: jax.Array) -> None:
        self._values, self.used = values, False

    def __call__(self, step: jax.Array) -> jax.Array:
        """Return the noise of a step."""
        self.used = True
        return jnp.take(self._values, step, axis=0)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32)  # also where JAX's default is float64
