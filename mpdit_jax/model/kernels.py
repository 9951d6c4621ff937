"""Attention and matrix-product kernels by platform, chosen when a model is created.

GPUs and TPUs run the plain formulas, compiled by XLA. CPUs run variants that are faster there, as measured with
`python -m mpdit_jax.benchmark sample` (docs/sampling.md). The values agree up to rounding.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from mpdit_jax.errors import DeviceWarning
from mpdit_jax.model.config import ModelConfig

_LARGEST_CUDNN_HEAD = 128  # that its backward pass takes on every generation of GPUs

Attend: TypeAlias = Callable[[jax.Array], jax.Array]
"""A function from qkv (B, T, 3, heads, d) to (B, T, heads, d). Hashable, as a part of the model's structure."""


def attention_kernel(config: ModelConfig) -> Attend:
    """Return the softmax attention for the config's platform; XLA's, with a DeviceWarning, where cuDNN's cannot run."""
    platform = _platform(config.platform)
    if config.attention == "cudnn":
        obstacle = _cudnn_obstacle(config, platform)
        if not obstacle:
            return AllHeads("cudnn")
        warnings.warn(
            f"model.attention='cudnn' needs {obstacle}: 'xla' is used, which agrees up to rounding.",
            DeviceWarning,
            stacklevel=2,
        )
    return HeadByHead(config.dtype) if platform == "cpu" else AllHeads("xla")


def _cudnn_obstacle(config: ModelConfig, platform: str) -> str:
    """Return what cuDNN's attention needs and this machine or model has not, or "" if it can run."""
    if not platform == jax.default_backend() == "gpu" or config.dtype != "bfloat16":
        return f"an NVIDIA GPU and bfloat16, and this is {config.dtype} on {jax.default_backend()}"
    device: Any = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return f"an NVIDIA GPU, and this is {device.device_kind}"
    if tuple(map(int, device.compute_capability.split("."))) < (8, 0):
        return f"a GPU of the Ampere generation or later, and this is {device.device_kind}"
    head_size = config.hidden_size // config.num_heads
    if head_size % 8 or head_size > _LARGEST_CUDNN_HEAD:
        return f"heads whose size is a multiple of 8, at most {_LARGEST_CUDNN_HEAD}, and this model's is {head_size}"
    return ""


def at_least_float32(x: jax.Array) -> jax.Array:
    """Cast to float32; float64 stays float64, in which tests compare derivatives with finite differences."""
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def of_one_dtype(*arrays: jax.Array) -> list[jax.Array]:
    """Cast arrays to the widest of their dtypes: on CPUs, products of bfloat16 are float32 (see `product_dtype`)."""
    widest = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)
    return [array.astype(widest) for array in arrays]


def operand_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """Return the precision of products of operands of `dtype`: HIGHEST from 4 bytes on, else None.

    With HIGHEST, TPUs and GPUs do not round float32 operands to bfloat16 or TF32. Products of bfloat16 operands are the
    same without it. In the backward pass of attention a float32 gradient meets a bfloat16 operand: HIGHEST would be a
    float32 product there, which GPUs compute without their tensor cores, and so the gradient is rounded instead.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else None


def product_dtype(platform: str) -> jax.typing.DTypeLike | None:
    """Return the result dtype of products of bfloat16 matrices: float32 on CPUs, None (bfloat16) elsewhere.

    With a bfloat16 result, XLA on CPUs converts the operands to float32 first and so does not use the processor's
    bfloat16 instructions. A float32 result is rounded at the next product.
    """
    return jnp.float32 if _platform(platform) == "cpu" else None


@dataclasses.dataclass(frozen=True)
class AllHeads:
    """`jax.nn.dot_product_attention` over all heads at once."""

    implementation: Literal["xla", "cudnn"]

    def __call__(self, qkv: jax.Array) -> jax.Array:
        """Map qkv (B, T, 3, heads, d) to (B, T, heads, d)."""
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # each (B, T, heads, d)
        with jax.numpy_dtype_promotion("standard"):  # JAX scales bfloat16 logits by a float32
            return jax.nn.dot_product_attention(query, key, value, implementation=self.implementation)


@dataclasses.dataclass(frozen=True)
class HeadByHead:
    """Attention one head at a time over the whole batch, so that the (B, T, T) weights stay in the processor's caches.

    The backward pass recomputes the weights, which is cheaper than reading them from memory.
    """

    dtype: str  # dtype of the operands of both products; all else is float32

    def __call__(self, qkv: jax.Array) -> jax.Array:
        """Map qkv (B, T, 3, heads, d) to float32 (B, T, heads, d)."""
        per_head = qkv.transpose(3, 2, 0, 1, 4).astype(self.dtype)  # (heads, 3, B, T, d)
        y = jax.lax.map(jax.checkpoint(_attend, prevent_cse=False), per_head)  # (heads, B, T, d)
        return y.transpose(1, 2, 0, 3)


def _attend(qkv: jax.Array) -> jax.Array:
    """Map one head's query, key and value (3, B, T, d) to float32 (B, T, d)."""
    query, key, value = qkv
    wide = qkv.dtype if qkv.dtype.itemsize >= 4 else jnp.float32
    logits = jnp.einsum("bqd,bkd->bqk", query, key, preferred_element_type=wide) * query.shape[-1] ** -0.5
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))  # (B, T, T)
    sums = weights.sum(axis=-1, keepdims=True)  # (B, T, 1)
    # Dividing (B, T, d) by the sums is cheaper than dividing the (B, T, T) weights.
    return jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=wide) / sums


def _platform(name: str) -> str:
    return jax.default_backend() if name == "auto" else name
