"""How time and class reach the blocks, by name: the class as tokens or as a vector, one modulation or one a block.

MPDiT has class tokens and one modulation that everything shares (paper, sections 3.2 and 3.3). DiT adds a class vector
to the time vector and gives every block, and the final layer, a modulation of its own. Any pair of the two works.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mpdit_jax.distributed.mesh import constrain_batch
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.linear import NORMAL_002, ZEROS, linear


class Modulation(NamedTuple):
    """The six vectors (B, D) that condition a block's two halves."""

    shift1: jax.Array
    scale1: jax.Array
    gate1: jax.Array
    shift2: jax.Array
    scale2: jax.Array
    gate2: jax.Array


class ClassEmbedding(NamedTuple):
    """What a class puts in front of the image tokens, and what it adds to the time vector."""

    tokens: jax.Array  # (B, m, D); m = 0 for none
    vector: jax.Array | None  # (B, D) float32


class ClassTokens(nnx.Module):
    """A learned table of `class_tokens` tokens a class, with one more row for the null class (paper, section 3.3)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.tokens, self.dtype = config.class_tokens, config.dtype
        self.table = _table(config, config.class_tokens * config.hidden_size, rngs)

    def __call__(self, labels: jax.Array) -> ClassEmbedding:
        """Tokens (B, m, D) of int labels (B,)."""
        rows = _rows(self.table[...], labels)  # (B, m * D)
        return ClassEmbedding(rows.reshape(labels.shape[0], self.tokens, -1).astype(self.dtype), None)


class ClassVector(nnx.Module):
    """DiT's: a learned vector a class, with one more row for the null class, added to the time vector."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        self.table = _table(config, config.hidden_size, rngs)

    def __call__(self, labels: jax.Array) -> ClassEmbedding:
        """A vector (B, D) and no tokens (B, 0, D), of int labels (B,)."""
        vector = _rows(self.table[...], labels)  # (B, D)
        return ClassEmbedding(jnp.zeros((vector.shape[0], 0, vector.shape[1]), self.dtype), vector)


CONDITIONS: dict[str, Callable[[ModelConfig, nnx.Rngs], nnx.Module]] = {"tokens": ClassTokens, "vector": ClassVector}


class ModulationMap(nnx.Module):
    """A conditioning vector to the six vectors of a block: SiLU, Linear(D -> 6D), in float32; zero at the start."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.linear = linear(config.hidden_size, 6 * config.hidden_size, rngs, kernel_init=ZEROS)

    def __call__(self, vector: jax.Array) -> Modulation:
        """(B, D) to six (B, D)."""
        return Modulation(*jnp.split(self.linear(nnx.silu(vector)), 6, axis=-1))


class FinalMap(nnx.Module):
    """DiT's final layer: SiLU, Linear(D -> 2D), in float32; zero at the start."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.linear = linear(config.hidden_size, 2 * config.hidden_size, rngs, kernel_init=ZEROS)

    def __call__(self, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, D) to shift and scale, (B, D) each."""
        shift, scale = jnp.split(self.linear(nnx.silu(vector)), 2, axis=-1)
        return shift, scale


class Identity(nnx.Module):
    """Takes what it is given: made elsewhere, or to be made later."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        pass

    def __call__(self, condition: Any) -> Any:
        """The same."""
        return condition


class SharedFinal(nnx.Module):
    """MPDiT's final layer takes shift and scale of the shared modulation's second half."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        pass

    def __call__(self, modulation: Modulation) -> tuple[jax.Array, jax.Array]:
        """Shift and scale, (B, D) each."""
        return modulation.shift2, modulation.scale2


@dataclasses.dataclass(frozen=True)
class ModulationParts:
    """Where the maps of a kind of modulation are.

    Attributes:
        model: from the conditioning vector (B, D) to what every block and the final layer are given.
        block: from that to the block's `Modulation`.
        final: from that to the final layer's shift and scale.
    """

    model: Callable[[ModelConfig, nnx.Rngs], nnx.Module]
    block: Callable[[ModelConfig, nnx.Rngs], nnx.Module]
    final: Callable[[ModelConfig, nnx.Rngs], nnx.Module]


MODULATIONS = {
    "shared": ModulationParts(model=ModulationMap, block=Identity, final=SharedFinal),
    "per_block": ModulationParts(model=Identity, block=ModulationMap, final=FinalMap),
}


def _table(config: ModelConfig, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(NORMAL_002(rngs.params(), (config.num_classes + 1, width), jnp.float32))


def _rows(table: jax.Array, labels: jax.Array) -> jax.Array:
    """The rows of int labels (B,). A label outside the table gives NaN, never a neighbour's row."""
    # jnp.take counts negative indices from the end.
    labels = jnp.where(labels < 0, table.shape[0], labels)
    # The table is split by columns. Split by rows before anything reshapes them, they need not be gathered whole.
    return constrain_batch(jnp.take(table, labels, axis=0, mode="fill", fill_value=jnp.nan))
