"""Noise that belongs to an image: a function of (key, the image's number, the step), whatever batch it is drawn in."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.flow.solvers import Increments

_INCREMENTS = np.uint32(2**32 - 1)  # no image has this number


@partial(jax.jit, static_argnames="shape")
def draw_noise(key: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise (n, *shape) of the images numbered `indices` (n,): a function of (key, index) alone."""
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape))(indices)


def noise_increments(key: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> Increments:
    """The noise of a stochastic solver's steps, for the images numbered `indices` (n,)."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, _INCREMENTS)))(indices)

    def increments(step: jax.Array) -> jax.Array:
        return jax.vmap(lambda image: jax.random.normal(jax.random.fold_in(image, step), shape))(keys)

    return increments


def given_increments(values: jax.Array) -> Increments:
    """Noise read from an array (steps, n, H, W, C)."""
    return lambda step: jnp.take(values, step, axis=0)
