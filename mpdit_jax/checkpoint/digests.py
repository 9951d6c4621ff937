"""Digests of arrays, by which a checkpoint that is read is compared with what was saved.

A digest is two sums over an array's entries, modulo 2^32, of numbers mixed from the entry's bits and its position. Sums
do not depend on the sharding: every process adds up the part it holds, and one device checks what eight saved. A
changed entry always changes the first sum (its mixing is a bijection); several changes cancel with a probability of
about 2^-64. Digests guard against damage, not forgery.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

Digests = dict[str, str]
"""From an array's path in its tree to dtype, shape and digest, such as `float32[2, 16] 0123456789abcdef`."""


def digests(tree: Any) -> Digests:
    """Return the digests of all arrays of a pytree, which may be sharded in any way. Collective."""
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
              for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}  # fmt: skip
    if not leaves:
        return {}
    found = jax.device_get(_summed(_everywhere(next(iter(leaves.values()))))(list(leaves.values())))
    return {
        name: f"{leaf.dtype.name}{list(leaf.shape)} {int(first):08x}{int(second):08x}"
        for (name, leaf), (first, second) in zip(leaves.items(), np.asarray(found), strict=True)
    }


def differing(saved: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return the names whose digests differ or that only one of both has."""
    return [name for name in sorted({*saved, *found}) if saved.get(name) != found.get(name)]


def _everywhere(leaf: jax.Array) -> Sharding | None:
    """Return the sharding of the sums: replicated over the mesh."""
    sharding = leaf.sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


@lru_cache(maxsize=8)  # one program for saving and one for each part that is read
def _summed(where: Sharding | None) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(lambda leaves: jnp.stack([_sums(leaf) for leaf in leaves]), out_shardings=where)


@jax.jit  # a state has many arrays of few shapes: each shape is traced once
def _sums(x: jax.Array) -> jax.Array:
    """Return the two sums, uint32 (2,). Operations of `lax` are traced several times faster than those of `jnp`."""
    bits = _bits(x)
    position, stride = lax.full(bits.shape, 0, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        along = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = lax.add(position, lax.mul(along, np.uint32(stride % 2**32)))
        stride *= bits.shape[axis]
    mixed = _mix(lax.bitwise_xor(bits, lax.mul(position, np.uint32(0x9E3779B1))))
    weight, axes = lax.bitwise_or(lax.shift_left(position, np.uint32(1)), np.uint32(1)), tuple(range(bits.ndim))
    sums = lax.reduce_sum(mixed, axes), lax.reduce_sum(lax.mul(mixed, weight), axes)
    return lax.concatenate([lax.reshape(each, (1,)) for each in sums], 0)


def _bits(x: jax.Array) -> jax.Array:
    """Return the entries as uint32; those of 8 bytes as two along a new last axis."""
    if x.dtype == jnp.bool_:
        return lax.convert_element_type(x, jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    return lax.convert_element_type(lax.bitcast_convert_type(x, unsigned), jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Apply the finalizer of MurmurHash3 (public domain): a bijection of 32 bits in which each depends on all."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = lax.mul(_fold(x, shift), np.uint32(factor))
    return _fold(x, 16)


def _fold(x: jax.Array, shift: int) -> jax.Array:
    return lax.bitwise_xor(x, lax.shift_right_logical(x, np.uint32(shift)))
