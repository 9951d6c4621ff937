"""The transformer block, and a stack of blocks run by a scan."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from mpdit_jax.distributed.mesh import constrain_batch
from mpdit_jax.model.conditioning import MODULATIONS
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.kernels import at_least_float32, attention_kernel, operand_precision
from mpdit_jax.model.linear import linear


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalize the last axis in float32, without affine parameters, ε = 1e-6. The result has the dtype of `x`."""
    y = at_least_float32(x)
    mean = y.mean(axis=-1, keepdims=True)
    variance = jnp.square(y - mean).mean(axis=-1, keepdims=True)
    return ((y - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Return `x * (1 + scale) + shift`, with the (B, D) vectors broadcast over the tokens of x (B, T, D)."""
    return x * (1 + scale[:, None].astype(x.dtype)) + shift[:, None].astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Apply the tanh GELU."""
    return jax.nn.gelu(x, approximate=True)


TokenMap: TypeAlias = Callable[[jax.Array], jax.Array]
"""A function that maps every token by itself, (B, T, D) to (B, T, E)."""


def recompute_input(prepare: TokenMap, layer: nnx.Linear) -> TokenMap:
    """Return `layer ∘ prepare` with a backward pass that stores x and computes `prepare(x)` again.

    Recomputing a norm or an activation is cheaper than writing it to memory and reading it back, and no matrix product
    is done twice. This holds inside a scan; elsewhere XLA may merge the two computations and store the result.
    """
    return jax.checkpoint(lambda x: layer(prepare(x)), prevent_cse=False)


class Attention(nnx.Module):
    """Multi-head self-attention with a fused qkv map whose output index is (q|k|v, head, channel)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.heads, self.attend = config.num_heads, attention_kernel(config)
        self.qkv = linear(width, 3 * width, rngs, dtype=config.dtype, platform=config.platform)
        self.out = linear(width, width, rngs, dtype=config.dtype, platform=config.platform)

    def __call__(self, x: jax.Array, norm: TokenMap) -> jax.Array:
        """Apply self-attention to norm(x), (B, T, D) to (B, T, D)."""
        batch, length, width = x.shape
        qkv = recompute_input(norm, self.qkv)(x)  # (B, T, 3 * D)
        qkv = qkv.reshape(batch, length, 3, self.heads, width // self.heads)  # (B, T, 3, heads, d)
        with jax.default_matmul_precision("highest" if operand_precision(qkv.dtype) else None):
            y = self.attend(qkv)  # (B, T, heads, d)
        return self.out(y.reshape(batch, length, width))


class MLP(nnx.Module):
    """Linear, tanh GELU, Linear."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, hidden = config.hidden_size, config.mlp_size
        self.inner = linear(width, hidden, rngs, dtype=config.dtype, platform=config.platform)
        self.outer = linear(hidden, width, rngs, dtype=config.dtype, platform=config.platform)

    def __call__(self, x: jax.Array, norm: TokenMap) -> jax.Array:
        """Apply the MLP to norm(x), (B, T, D) to (B, T, D)."""
        hidden = recompute_input(norm, self.inner)(x)  # (B, T, mlp_ratio * D)
        return recompute_input(gelu, self.outer)(hidden)


class Block(nnx.Module):
    """A pre-norm transformer block with modulated norms (shift, scale) and residuals (gate)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.modulation = MODULATIONS[config.modulation].block(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array, condition: Any) -> jax.Array:
        """Map tokens (B, T, D) to (B, T, D); `condition` is what `MPDiT.condition` returns."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        gate1, gate2 = gate1[:, None].astype(x.dtype), gate2[:, None].astype(x.dtype)
        x = x + gate1 * self.attention(x, lambda tokens: modulate(layer_norm(tokens), shift1, scale1))
        return x + gate2 * self.mlp(x, lambda tokens: modulate(layer_norm(tokens), shift2, scale2))


class BlockStack(nnx.Module):
    """A stack of `depth` blocks with stacked parameters, run by one scan: compile time does not grow with depth."""

    def __init__(self, depth: int, config: ModelConfig, rngs: nnx.Rngs) -> None:
        create = nnx.split_rngs(splits=depth)(nnx.vmap(lambda layer_rngs: Block(config, layer_rngs)))
        self.layers = create(rngs)  # every parameter has a leading axis of size depth
        self.remat = config.remat

    def __call__(self, x: jax.Array, condition: Any, layers: slice = slice(None)) -> jax.Array:
        """Map tokens (B, T, D) to (B, T, D) through the blocks that `layers` selects."""
        structure, stacked = nnx.split(self.layers)
        if layers != slice(None):
            stacked = jax.tree.map(lambda parameter: parameter[layers], stacked)

        def apply_layer(x: jax.Array, parameters: nnx.State) -> tuple[jax.Array, None]:
            block: Block = nnx.merge(structure, parameters)
            return constrain_batch(block(x, condition)), None

        return jax.lax.scan(REMAT[self.remat](apply_layer), constrain_batch(x), stacked)[0]


_KEEP_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT: dict[str, Callable[..., Any]] = {
    "none": lambda step: step,
    "dots": partial(jax.checkpoint, policy=_KEEP_DOTS, prevent_cse=False),
    "full": partial(jax.checkpoint, prevent_cse=False),
}
