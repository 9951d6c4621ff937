"""Masked training: random tokens are hidden from most blocks of an isotropic model, which lowers its training cost.

This is a baseline for the paper's levels, after MaskDiT (Zheng et al. 2023). The trunk, which is all blocks but the
last `decoder_depth`, sees the class tokens and a random subset of the image tokens, gathered so that attention and MLPs
cost less. The decoder, the last `decoder_depth` blocks, sees all tokens, with a learned mask token in place of each
hidden one. MaskDiT adds blocks for its decoder; here masked and unmasked models have the same blocks. Sampling runs
every block on every token.
"""

import jax
import jax.numpy as jnp

from mpdit_jax.distributed.mesh import constrain_batch
from mpdit_jax.errors import InputError
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.embeddings import patchify
from mpdit_jax.model.kernels import of_one_dtype
from mpdit_jax.model.mpdit import MPDiT


def kept_tokens(config: ModelConfig, mask_ratio: float) -> int:
    """Return the number of image tokens that the trunk sees, at least 1."""
    rows, columns = config.grid(0)
    return max(1, rows * columns - int(rows * columns * mask_ratio + 1e-6))


def draw_kept(key: jax.Array, config: ModelConfig, mask_ratio: float, count: int) -> jax.Array:
    """Draw a random subset of the image tokens for each of `count` examples: int32 (count, K), ascending."""
    rows, columns = config.grid(0)
    order = jnp.argsort(jax.random.uniform(key, (count, rows * columns)), axis=1)
    return jnp.sort(order[:, : kept_tokens(config, mask_ratio)], axis=1).astype(jnp.int32)


def masked_velocity(
    model: MPDiT, x: jax.typing.ArrayLike, t: jax.typing.ArrayLike, y: jax.typing.ArrayLike, kept: jax.Array
) -> jax.Array:
    """Return the velocity of a model whose trunk sees the `kept` (B, K) image tokens alone; else as `model(x, t, y)`.

    Raise InputError as the model does, and if it has no decoder.
    """
    if model.mask_token is None:
        raise InputError("model.decoder_depth=0: masked training needs a decoder_depth of 1 or more.")
    x, t, y = model.check(x, t, y)
    embedding, level = model.class_embedding(y), model.levels[0]
    modulation = jax.tree.map(constrain_batch, model.modulation(t))  # see MPDiT.__call__
    condition, dtype = model.condition(modulation, embedding), embedding.tokens.dtype
    prefix, decoder = embedding.tokens.shape[1], model.config.depths[0] - model.config.decoder_depth
    image = level.embed(x.astype(dtype))  # (B, N, D)
    visible = jnp.take_along_axis(image, kept[..., None], axis=1)  # (B, K, D)
    tokens = jnp.concatenate(of_one_dtype(embedding.tokens, visible), axis=1)  # (B, m + K, D)
    tokens = level.blocks(tokens, condition, slice(None, decoder))
    mask_token = model.mask_token[...].astype(dtype)[None, None]  # (1, 1, D)
    hidden = jnp.broadcast_to(mask_token + level.positions(dtype), image.shape)  # (B, N, D)
    classes, visible = tokens[:, :prefix], tokens[:, prefix:].astype(hidden.dtype)
    image = jax.vmap(lambda all_tokens, rows, values: all_tokens.at[rows].set(values))(hidden, kept, visible)
    tokens = level.blocks(jnp.concatenate(of_one_dtype(classes, image), axis=1), condition, slice(decoder, None))
    return model.final_layer(tokens, condition)


def split_error(squares: jax.Array, kept: jax.Array, patch: int) -> tuple[jax.Array, jax.Array]:
    """Return the mean of squared errors (B, H, W, C) over kept patches and over hidden patches, (B,) each.

    If no patch is hidden, the second mean is 0.
    """
    patches = patchify(squares, patch).mean(axis=-1)  # (B, N)
    count, visible = patches.shape[1], kept.shape[1]
    kept_sum = jnp.take_along_axis(patches, kept, axis=1).sum(axis=1)
    return kept_sum / visible, (patches.sum(axis=1) - kept_sum) / max(1, count - visible)
