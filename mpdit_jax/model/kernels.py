"""How a platform computes attention and bfloat16 products fastest; chosen once, when a model is made.

GPUs and TPUs get what XLA makes of the plain formulas. What is different on CPUs was measured with
`python -m mpdit_jax.benchmark sample`; docs/sampling.md has the figures. The values agree to rounding.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from mpdit_jax.model.config import ModelConfig

Attend: TypeAlias = Callable[[jax.Array], jax.Array]
"""Queries, keys and values (B, T, 3, heads, d) to (B, T, heads, d). Hashable: part of a model's structure."""


def attention_kernel(config: ModelConfig) -> Attend:
    """Softmax attention for the config's platform."""
    if config.attention == "xla" and _platform(config.platform) == "cpu":
        return HeadByHead(config.dtype)
    return AllHeads(config.attention)


def product_dtype(platform: str) -> jax.typing.DTypeLike | None:
    """The dtype in which products of bfloat16 matrices come out, or None for bfloat16.

    A CPU with bfloat16 instructions sums in float32 and would have to round the result; XLA does that by converting the
    operands to float32 first, which forgoes those instructions. float32 results go on as float32, to the next product.
    """
    return jnp.float32 if _platform(platform) == "cpu" else None


@dataclasses.dataclass(frozen=True)
class AllHeads:
    """JAX's own attention, every head at once."""

    implementation: Literal["xla", "cudnn"]

    def __call__(self, qkv: jax.Array) -> jax.Array:
        """(B, T, 3, heads, d) to (B, T, heads, d)."""
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # each (B, T, heads, d)
        return jax.nn.dot_product_attention(query, key, value, implementation=self.implementation)


@dataclasses.dataclass(frozen=True)
class HeadByHead:
    """One head of the whole batch at a time, so that its (B, T, T) weights stay in the caches.

    The backward pass computes them again, which is cheaper than to fetch them from memory.

    Attributes:
        dtype: of the operands of both products; the rest is float32, the result too.
    """

    dtype: str

    def __call__(self, qkv: jax.Array) -> jax.Array:
        """(B, T, 3, heads, d) to float32 (B, T, heads, d)."""
        per_head = qkv.transpose(3, 2, 0, 1, 4).astype(self.dtype)  # (heads, 3, B, T, d)
        y = jax.lax.map(jax.checkpoint(_attend, prevent_cse=False), per_head)  # (heads, B, T, d)
        return y.transpose(1, 2, 0, 3)


def _attend(qkv: jax.Array) -> jax.Array:
    """A head's query, key and value (3, B, T, d) to float32 (B, T, d).

    The sum of the weights is divided out of the result, not of the weights.
    """
    query, key, value = qkv
    logits = jnp.einsum("bqd,bkd->bqk", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))  # (B, T, T)
    sums = weights.sum(axis=-1, keepdims=True)  # (B, T, 1)
    return jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32) / sums


def _platform(name: str) -> str:
    return jax.default_backend() if name == "auto" else name
