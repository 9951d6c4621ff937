"""Token reduction by random masking, for training an isotropic model at a part of its cost.

The contrast to the paper's levels, which keep every region of the image in sight: the trunk sees a random subset of the
fine tokens and the class tokens (gathered, so that attention and MLPs cost less), a learned mask token takes the place
of the others, and the last `decoder_depth` blocks see all of them, as in MaskDiT (Zheng et al. 2023). MaskDiT adds
blocks for its decoder; here they are the model's last ones, so that masked and unmasked models have the same blocks.
Sampling runs every block on every token.
"""

import jax
import jax.numpy as jnp

from mpdit_jax.distributed.mesh import constrain_batch
from mpdit_jax.errors import InputError
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.embeddings import patchify
from mpdit_jax.model.mpdit import MPDiT


def kept_tokens(config: ModelConfig, mask_ratio: float) -> int:
    """How many image tokens the trunk sees: at least one."""
    rows, columns = config.grid(0)
    return max(1, rows * columns - int(rows * columns * mask_ratio + 1e-6))


def draw_kept(key: jax.Array, config: ModelConfig, mask_ratio: float, count: int) -> jax.Array:
    """Which image tokens stay: int32 (count, K), each row a random subset of its own, ascending."""
    rows, columns = config.grid(0)
    order = jnp.argsort(jax.random.uniform(key, (count, rows * columns)), axis=1)
    return jnp.sort(order[:, : kept_tokens(config, mask_ratio)], axis=1).astype(jnp.int32)


def masked_velocity(
    model: MPDiT, x: jax.typing.ArrayLike, t: jax.typing.ArrayLike, y: jax.typing.ArrayLike, kept: jax.Array
) -> jax.Array:
    """The velocity by a model that sees the `kept` (B, K) image tokens in its trunk; arguments and result as a call's.

    Raises:
        InputError: a shape does not fit the model, labels that are not whole numbers, or a model without a decoder.
    """
    if model.mask_token is None:
        raise InputError("model.decoder_depth=0: a model that is trained with hidden tokens needs 1 or more.")
    x, t, y = model.check(x, t, y)
    embedding, level = model.class_embedding(y), model.levels[0]
    modulation = jax.tree.map(constrain_batch, model.modulation(t))  # see MPDiT.__call__
    condition, dtype = model.condition(modulation, embedding), embedding.tokens.dtype
    prefix, decoder = embedding.tokens.shape[1], model.config.depths[0] - model.config.decoder_depth
    image = level.embed(x.astype(dtype))  # (B, N, D)
    visible = jnp.take_along_axis(image, kept[..., None], axis=1)  # (B, K, D)
    tokens = jnp.concatenate([embedding.tokens, visible], axis=1)  # (B, m + K, D)
    tokens = level.blocks(tokens, condition, slice(None, decoder))
    classes, visible = tokens[:, :prefix], tokens[:, prefix:]
    hidden = jnp.broadcast_to(model.mask_token[...].astype(dtype) + level.positions(dtype), image.shape)  # (B, N, D)
    image = jax.vmap(lambda everywhere, rows, here: everywhere.at[rows].set(here))(hidden, kept, visible)  # (B, N, D)
    tokens = level.blocks(jnp.concatenate([classes, image], axis=1), condition, slice(decoder, None))
    return model.read(tokens, condition)


def split_error(squares: jax.Array, kept: jax.Array, patch: int) -> tuple[jax.Array, jax.Array]:
    """Mean of squared errors (B, H, W, C) over the patches that are kept and over those that are hidden, (B,) each.

    The mean over nothing is 0.
    """
    patches = patchify(squares, patch).mean(axis=-1)  # (B, N)
    count, visible = patches.shape[1], kept.shape[1]
    seen = jnp.take_along_axis(patches, kept, axis=1).sum(axis=1)
    return seen / visible, (patches.sum(axis=1) - seen) / max(1, count - visible)
