"""Training with the trunk's output dropped, and the tail alone as a weak model for autoguidance.

In training, a random share of the examples (`config.trunk_drop`) reaches the tail, which is the last level, without the
upsampled coarse tokens: it sees the class tokens as embedded and the linear skip of its own patches. Alone it
is a weaker model, and guidance steers away from it (autoguidance, Karras et al. 2024). It costs 49 % of a pass of
mpdit_xl, 53 % of mpdit_l and 77 % of mpdit_b (`accounting.tail_macs`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpdit_jax.distributed.mesh import constrain_batch
from mpdit_jax.errors import InputError
from mpdit_jax.model.conditioning import ClassEmbedding, TrunkTail
from mpdit_jax.model.kernels import of_one_dtype
from mpdit_jax.model.mpdit import MPDiT


def dropped_velocity(model: MPDiT, x: jax.Array, t: jax.Array, y: jax.Array, dropped: jax.Array) -> jax.Array:
    """Return the velocity; where `dropped`, bool (B,), an example goes through the tail alone, without the trunk.

    Raise InputError as the model does, and if it has no tail that could work alone.
    """
    check_tail(model)
    x, t, y = model.check(x, t, y)
    embedding = model.class_embedding(y)
    modulation = jax.tree.map(constrain_batch, model.modulation(t))  # see MPDiT.__call__
    condition = _condition(model, modulation, embedding)
    tokens, x = embedding.tokens, x.astype(embedding.tokens.dtype)
    *trunk, tail = model.levels
    for level in trunk:
        tokens = level(tokens, x, condition, level.depth)
    alone, tokens = of_one_dtype(_enter_alone(tail, embedding, x), tail.enter(tokens, x))
    tokens = jnp.where(dropped[:, None, None], alone, tokens)
    return model.final_layer(tail.transform(tokens, condition, 0), condition.tail)


class TailOnly(nnx.Module):
    """The tail of a model alone, as a model: `sampler(model, labels, key, guide=TailOnly(model))`."""

    def __init__(self, model: MPDiT) -> None:
        check_tail(model)
        self.model = model

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the latents."""
        return self.model.input_shape

    @property
    def num_classes(self) -> int:
        """Number of classes; also the label of the null class."""
        return self.model.num_classes

    @property
    def convention(self) -> str:
        """Convention of the output."""
        return self.model.convention

    def __call__(self, x: jax.typing.ArrayLike, t: jax.typing.ArrayLike, y: jax.typing.ArrayLike) -> jax.Array:
        """Return the velocity (B, H, W, C) at latents x (B, H, W, C), times t (B,) and labels y (B,)."""
        x, t, y = self.model.check(x, t, y)
        return self.velocity(x, self.modulation(t), self.class_embedding(y))

    def modulation(self, t: jax.Array) -> Any:
        """Return the model's modulation of times (B,)."""
        return self.model.modulation(t)

    def class_embedding(self, y: jax.Array) -> ClassEmbedding:
        """Embed labels (B,) as the model does."""
        return self.model.class_embedding(y)

    def velocity(self, x: jax.Array, modulation: Any, class_embedding: ClassEmbedding) -> jax.Array:
        """Return the velocity, given the results of `modulation` and `class_embedding`."""
        condition, tail = _condition(self.model, modulation, class_embedding), self.model.levels[-1]
        tokens = _enter_alone(tail, class_embedding, x.astype(class_embedding.tokens.dtype))
        return self.model.final_layer(tail.transform(tokens, condition, 0), condition.tail)

    def astype(self, dtype: str) -> "TailOnly":
        """Return a copy for inference that computes in "float32" or "bfloat16"."""
        return TailOnly(self.model.astype(dtype))


def check_tail(model: MPDiT) -> None:
    """Raise InputError unless the model's last level sees the latents without the trunk."""
    if len(model.config.depths) == 1 or not model.config.skip:
        raise InputError(
            f"patch_sizes={model.config.patch_sizes}, skip={model.config.skip}: a tail works alone in a model of two "
            "levels or more with skip=True."
        )


def _condition(model: MPDiT, modulation: Any, embedding: ClassEmbedding) -> TrunkTail:
    condition = model.condition(modulation, embedding)
    return TrunkTail(condition, condition)


def _enter_alone(tail: Any, embedding: ClassEmbedding, x: jax.Array) -> jax.Array:
    """Return the tokens (B, m + N, D) in front of the tail's blocks: class tokens, and patches of the tail's own."""
    return jnp.concatenate(of_one_dtype(embedding.tokens, tail.embed(x)), axis=1)
