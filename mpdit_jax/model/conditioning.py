"""Conditioning on time and class: `CONDITIONS` embed the class, `MODULATIONS` modulate the blocks.

MPDiT has class tokens and one shared modulation (paper, sections 3.2 and 3.3). DiT adds a class vector to the time
vector and gives every block and the final layer a modulation of its own. The two choices are independent.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from mpdit_jax.distributed.mesh import constrain_batch
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.linear import NORMAL_002, ZEROS, linear


class Modulation(NamedTuple):
    """The six vectors (B, D) that modulate a block: the first three its attention, the last three its MLP."""

    shift1: jax.Array
    scale1: jax.Array
    gate1: jax.Array
    shift2: jax.Array
    scale2: jax.Array
    gate2: jax.Array


class TrunkTail(NamedTuple):
    """Conditioning of a flow map, which jumps from time t to an earlier time r: the trunk sees t, the tail sees r."""

    trunk: Any  # for the blocks before the tail
    tail: Any  # for the tail and the final layer


class ClassEmbedding(NamedTuple):
    """An embedded class: tokens in front of the image tokens, or a vector that is added to the time vector."""

    tokens: jax.Array  # (B, m, D); m = 0 for none
    vector: jax.Array | None  # (B, D) float32


class ClassTokens(nnx.Module):
    """A learned table of `class_tokens` tokens per class, and a row for the null class (paper, section 3.3)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.tokens, self.dtype = config.class_tokens, config.dtype
        self.table = _table(config, config.class_tokens * config.hidden_size, rngs)

    def __call__(self, labels: jax.Array) -> ClassEmbedding:
        """Embed int labels (B,) as tokens (B, m, D)."""
        rows = _rows(self.table[...], labels)  # (B, m * D)
        return ClassEmbedding(rows.reshape(labels.shape[0], self.tokens, -1).astype(self.dtype), None)


class ClassVector(nnx.Module):
    """DiT's class embedding: a learned vector per class and one for the null class, added to the time vector."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.dtype = config.dtype
        self.table = _table(config, config.hidden_size, rngs)

    def __call__(self, labels: jax.Array) -> ClassEmbedding:
        """Embed int labels (B,) as a vector (B, D) and no tokens (B, 0, D)."""
        vector = _rows(self.table[...], labels)  # (B, D)
        return ClassEmbedding(jnp.zeros((vector.shape[0], 0, vector.shape[1]), self.dtype), vector)


Build: TypeAlias = Callable[[ModelConfig, nnx.Rngs], nnx.Module]
CONDITIONS: dict[str, Build] = {"tokens": ClassTokens, "vector": ClassVector}


class ModulationMap(nnx.Module):
    """SiLU and Linear(D -> 6D) from the conditioning vector to a block's modulation; float32, initially zero."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.linear = linear(config.hidden_size, 6 * config.hidden_size, rngs, kernel_init=ZEROS)

    def __call__(self, vector: jax.Array) -> Modulation:
        """Map a vector (B, D) to six vectors (B, D)."""
        return Modulation(*jnp.split(self.linear(nnx.silu(vector)), 6, axis=-1))


class FinalMap(nnx.Module):
    """SiLU and Linear(D -> 2D) from the conditioning vector to the final layer's shift and scale, as in DiT."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.linear = linear(config.hidden_size, 2 * config.hidden_size, rngs, kernel_init=ZEROS)

    def __call__(self, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map a vector (B, D) to shift and scale, (B, D) each."""
        shift, scale = jnp.split(self.linear(nnx.silu(vector)), 2, axis=-1)
        return shift, scale


class Identity(nnx.Module):
    """The identity, where the modulation is computed elsewhere."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        pass

    def __call__(self, condition: Any) -> Any:
        """Return `condition`."""
        return condition


class SharedFinal(nnx.Module):
    """The final layer's shift and scale in MPDiT, which are those of the shared modulation for the MLP."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        pass

    def __call__(self, modulation: Modulation) -> tuple[jax.Array, jax.Array]:
        """Return shift and scale, (B, D) each."""
        return modulation.shift2, modulation.scale2


@dataclasses.dataclass(frozen=True)
class ModulationParts:
    """The three modules of a kind of modulation."""

    model: Build  # maps the conditioning vector (B, D) to the input of every block and of the final layer
    block: Build  # maps that input to the block's Modulation
    final: Build  # maps that input to the final layer's shift and scale


MODULATIONS = {
    "shared": ModulationParts(model=ModulationMap, block=Identity, final=SharedFinal),
    "per_block": ModulationParts(model=Identity, block=ModulationMap, final=FinalMap),
}


def _table(config: ModelConfig, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(NORMAL_002(rngs.params(), (config.num_classes + 1, width), jnp.float32))


def _rows(table: jax.Array, labels: jax.Array) -> jax.Array:
    """Look up the rows of int labels (B,). A label outside the table gives NaN."""
    # jnp.take counts negative indices from the end.
    labels = jnp.where(labels < 0, table.shape[0], labels)
    # The table is split by columns. Splitting the rows by batch here keeps a later reshape from gathering them whole.
    return constrain_batch(jnp.take(table, labels, axis=0, mode="fill", fill_value=jnp.nan))
