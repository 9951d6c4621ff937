"""MPDiT: a diffusion transformer that runs most of its blocks on a few coarse tokens (arXiv 2603.26357).

    latents (B, H, W, C) ── patches of 4 ── + positions ── [class tokens | 64 coarse tokens] ── most blocks ──┐
                                                                                                          upsample
    latents (B, H, W, C) ── patches of 2 ── linear skip ──────────────────────────────────────────────────── + ──┤
                                                                                                         + positions
    velocity (B, H, W, C) ── unpatchify ── final linear ── few blocks ── [class tokens | 256 fine tokens] ────────┘

Every block and the final layer share one modulation, computed from the time. A model may have any number of levels.
With one level it is an isotropic transformer; with DiT's conditioning as well (conditioning.py) it is DiT.

The same network is a flow map: with the time t of the latents in the trunk and an earlier time r in the tail (the last
level and the final layer), `model(x, t, y, r)` is the average velocity from t to r, and x - (t - r) u jumps to r in one
evaluation (docs/flow_map.md). At r = t it is the velocity.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpdit_jax.distributed.mesh import constrain_batch, with_auto_axes
from mpdit_jax.errors import InputError
from mpdit_jax.model.blocks import BlockStack, layer_norm, modulate
from mpdit_jax.model.conditioning import CONDITIONS, MODULATIONS, ClassEmbedding, TrunkTail
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.embeddings import GuidanceEmbedding, SinusoidalTime, patchify, sincos_positions, unpatchify
from mpdit_jax.model.fno import FNOTime
from mpdit_jax.model.kernels import at_least_float32, of_one_dtype
from mpdit_jax.model.linear import NORMAL_002, ZEROS, linear
from mpdit_jax.model.upsample import Upsample

TIME_EMBEDDINGS = {"fno": FNOTime, "sinusoidal": SinusoidalTime}


class Level(nnx.Module):
    """The transformer blocks of one patch size, with the upsampler and the skip that lead into them."""

    def __init__(self, index: int, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.patch, self.grid, self.width = config.patch_sizes[index], config.grid(index), config.hidden_size
        patch_features = self.patch * self.patch * config.in_channels
        upsamples, embeds = index > 0, index == 0 or config.skip
        ratio = config.patch_sizes[index - 1] // self.patch if upsamples else 1
        self.upsample = Upsample(ratio, config.grid(index - 1), config, rngs) if upsamples else None
        linear_map = partial(linear, rngs=rngs, dtype=config.dtype, platform=config.platform)
        self.patch_embed = linear_map(patch_features, self.width) if embeds else None
        self.skip = linear_map(self.width, self.width) if upsamples and embeds else None
        self.depth = config.depths[index]
        self.blocks = BlockStack(self.depth, config, rngs)

    def __call__(self, tokens: jax.Array, latents: jax.Array, condition: TrunkTail, trunk_depth: int) -> jax.Array:
        """Map tokens (B, m + N_coarse, D) to (B, m + N, D). The first level receives the m class tokens alone.

        The first `trunk_depth` blocks of the level are part of the trunk, the others of the tail.
        """
        return self.transform(self.enter(tokens, latents), condition, trunk_depth)

    def enter(self, tokens: jax.Array, latents: jax.Array) -> jax.Array:
        """Map the previous level's tokens to the input tokens of this level's blocks, (B, m + N, D)."""
        image = self.embed(latents)  # (B, N, D), or (1, N, D) if the level has positions alone
        if self.upsample is None:
            return jnp.concatenate(of_one_dtype(tokens, image), axis=1)
        tokens, image = of_one_dtype(self.upsample(tokens), image)  # (B, m + N, D), (B, N, D)
        count = image.shape[1]
        return jnp.concatenate([tokens[:, :-count], tokens[:, -count:] + image], axis=1)

    def transform(self, tokens: jax.Array, condition: TrunkTail, trunk_depth: int) -> jax.Array:
        """Run the blocks on tokens (B, m + N, D)."""
        if condition.trunk is condition.tail or trunk_depth in (0, self.depth):
            return self.blocks(tokens, condition.trunk if trunk_depth else condition.tail)
        tokens = self.blocks(tokens, condition.trunk, slice(None, trunk_depth))
        return self.blocks(tokens, condition.tail, slice(trunk_depth, None))

    def embed(self, latents: jax.Array) -> jax.Array:
        """Embed the latents (B, H, W, C) as patches of this level, plus positions: (B, N, D)."""
        positions = self.positions(latents.dtype)
        if self.patch_embed is None:
            return positions
        patches = self.patch_embed(patchify(latents, self.patch))  # (B, N, D)
        patches = patches if self.skip is None else self.skip(patches)
        return positions.astype(patches.dtype) + patches  # products may be wider than the latents

    def positions(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return the fixed sin-cos positions, (1, N, D)."""
        return jnp.asarray(sincos_positions(self.grid, self.width), dtype)[None]


class MPDiT(nnx.Module):
    """The multi-patch diffusion transformer. It holds parameters alone: no random state, no train or eval mode.

    `model(x, t, y)` is `model.velocity(x, model.modulation(t), model.class_embedding(y))`. A sampler calls the parts
    itself: it computes `modulation` for all steps at once and `class_embedding` once.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        width, patch = config.hidden_size, config.patch_sizes[-1]
        self.time_embedding = TIME_EMBEDDINGS[config.time_embedding](config, rngs)
        self.class_embedding = CONDITIONS[config.condition](config, rngs)
        parts = MODULATIONS[config.modulation]
        self.time_modulation, self.final_modulation = parts.model(config, rngs), parts.final(config, rngs)
        self.levels = nnx.List([Level(index, config, rngs) for index in range(len(config.patch_sizes))])
        self.final = linear(width, patch * patch * config.in_channels, rngs, kernel_init=ZEROS)
        # Takes the place of the tokens hidden by masked training (masking.py); sampling never uses it.
        self.mask_token = nnx.Param(NORMAL_002(rngs.params(), (width,), jnp.float32)) if config.decoder_depth else None
        self.guidance_embedding = GuidanceEmbedding(config, rngs) if config.guidance_max > 1 else None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the latents."""
        return (*self.config.input_size, self.config.in_channels)

    @property
    def convention(self) -> str:
        """Convention of the output; "velocity" is noise minus data, with t = 0 at the data."""
        return self.config.convention

    @property
    def flow_map(self) -> bool:
        """Whether the model was trained as a flow map."""
        return self.config.flow_map

    @property
    def guidance_max(self) -> float:
        """Largest guidance scale that the model takes as an input; 1 if it takes none."""
        return self.config.guidance_max

    @property
    def num_classes(self) -> int:
        """Number of classes; also the label of the null class."""
        return self.config.num_classes

    @property
    def null_class(self) -> bool:
        """Whether the null class was trained."""
        return self.config.null_class

    def __call__(
        self,
        x: jax.typing.ArrayLike,
        t: jax.typing.ArrayLike,
        y: jax.typing.ArrayLike,
        r: jax.typing.ArrayLike | None = None,
        w: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Return the velocity dz/dt at latents `x`, time `t` (0 = data, 1 = noise) and class `y`.

        Args:
            x: noisy latents, float32 (B, H, W, C).
            t: times in [0, 1], float32 (B,).
            y: labels in [0, num_classes], int32 (B,); `num_classes` is the null class.
            r: times in [0, t], float32 (B,): return the average velocity from t to r instead, as a flow map does.
            w: guidance scales in [1, guidance_max], float32 (B,), of a model that takes them; default 1.

        Returns:
            float32 (B, H, W, C).

        Raises:
            InputError: a shape does not fit the model, a label is not an integer or out of range, r > t, or a scale
                that the model does not take. The values of traced arrays cannot be checked: a label out of range then
                gives NaN.
        """
        return with_auto_axes(MPDiT._call, (self,), (x, t, y, r, w), batched=(x, y, t), out=0)

    def _call(
        self,
        x: jax.typing.ArrayLike,
        t: jax.typing.ArrayLike,
        y: jax.typing.ArrayLike,
        r: jax.typing.ArrayLike | None,
        w: jax.typing.ArrayLike | None,
    ) -> jax.Array:
        x, t, y = self.check(x, t, y)
        r = None if r is None else check_arrival(r, t)
        w = None if w is None else check_guidance(w, t, self.guidance_max)
        # Without this constraint XLA splits the modulation by features and then gathers it for the whole batch.
        modulation = jax.tree.map(constrain_batch, self.modulation(t, r, w))
        return self.velocity(x, modulation, self.class_embedding(y))

    def check(
        self, x: jax.typing.ArrayLike, t: jax.typing.ArrayLike, y: jax.typing.ArrayLike
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the arguments of a call as arrays, split over the devices. Raise InputError as `__call__` does."""
        x, t, y = jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32), jnp.asarray(y)
        if x.shape[1:] != self.input_shape or t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            height, width, channels = self.input_shape
            raise InputError(
                f"x {x.shape}, t {t.shape}, y {y.shape}: this model takes x (B, {height}, {width}, {channels}), "
                "t (B,) and y (B,), channels last."
            )
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise InputError(f"y has dtype {y.dtype}: expected labels, whole numbers from 0 to {self.num_classes}.")
        if not isinstance(y, jax.core.Tracer):
            labels = np.asarray(y)
            outside = labels[(labels < 0) | (labels > self.num_classes)]
            if outside.size:
                raise InputError(
                    f"label {outside[0]} is out of range: this model has classes 0 to {self.num_classes - 1} "
                    f"(and {self.num_classes}, the null class)."
                )
        return constrain_batch(x), constrain_batch(t), constrain_batch(y)

    def modulation(self, t: jax.Array, r: jax.Array | None = None, w: jax.Array | None = None) -> Any:
        """Return the float32 modulation of times (B,), or, with condition="vector", the time vector (B, D).

        With `r` it is a TrunkTail of those of t and r. `w` are guidance scales (B,) of a model that takes them.
        """
        if r is not None:
            if self.config.tail_depth == sum(self.config.depths):
                raise InputError("a model of one block cannot be a flow map: it needs a block for t and one for r.")
            return self.jump_modulation(self.modulation(t, w=w), self.modulation(r, w=w))
        vector = self.time_embedding(t)  # (B, D); `condition` adds a class vector to it
        if self.guidance_embedding is not None:
            vector = vector + self.guidance_embedding(jnp.ones_like(t) if w is None else w)
        return vector if self.config.condition == "vector" else self.time_modulation(vector)

    def jump_modulation(self, start: Any, end: Any) -> TrunkTail:
        """Return the modulation of jumps from t to r, given the modulations of t (`start`) and of r (`end`)."""
        return TrunkTail(start, end)

    def velocity(self, x: jax.Array, modulation: Any, class_embedding: ClassEmbedding) -> jax.Array:
        """Map latents (B, H, W, C) and the results of `modulation` and `class_embedding` to velocities (B, H, W, C)."""
        condition, tokens = self.condition(modulation, class_embedding), class_embedding.tokens
        if not isinstance(condition, TrunkTail):
            condition = TrunkTail(condition, condition)
        x, config = x.astype(tokens.dtype), self.config
        trunk_depths = (*config.depths[:-1], config.depths[-1] - config.tail_depth)
        for level, trunk_depth in zip(self.levels, trunk_depths, strict=True):
            tokens = level(tokens, x, condition, trunk_depth)
        return self.final_layer(tokens, condition.tail)

    def condition(self, modulation: Any, class_embedding: ClassEmbedding) -> Any:
        """Return the conditioning that every block and the final layer receive."""
        if isinstance(modulation, TrunkTail):
            return TrunkTail(*(self.condition(part, class_embedding) for part in modulation))
        vector = class_embedding.vector
        return modulation if vector is None else self.time_modulation(modulation + vector)

    def final_layer(self, tokens: jax.Array, condition: Any) -> jax.Array:
        """Map tokens (B, m + N, D) of the last level to velocities (B, H, W, C), float32."""
        image = at_least_float32(tokens[:, self.config.prefix_tokens :])  # (B, N, D)
        image = self.final(modulate(layer_norm(image), *self.final_modulation(condition)))  # (B, N, p * p * C)
        return unpatchify(image, self.levels[-1].patch, self.levels[-1].grid)

    def astype(self, dtype: str) -> "MPDiT":
        """Return a copy for inference that computes in "float32" or "bfloat16".

        Weights of the levels and of the class tokens are stored in `dtype`, so that a sampling loop does not convert
        them at every step; all others, modulations included, stay float32. The outputs equal those of a model created
        with `dtype`.
        """

        def cast(path: Any, leaf: jax.Array) -> jax.Array:
            return leaf if "modulation" in path else leaf.astype(dtype)

        model = self._with(self.config.replace(dtype=dtype))
        for module in (model.levels, model.class_embedding) if self.config.condition == "tokens" else (model.levels,):
            nnx.update(module, nnx.map_state(cast, nnx.state(module)))
        return model

    def for_platform(self, platform: str) -> "MPDiT":
        """Return the same weights with the arithmetic that suits "cpu", "gpu" or "tpu" (kernels.py)."""
        return self._with(self.config.replace(platform=platform))

    def _with(self, config: ModelConfig) -> "MPDiT":
        """Return a model of `config` with this model's parameters, which must have the same shapes."""
        structure = nnx.graphdef(nnx.eval_shape(lambda: MPDiT(config, nnx.Rngs(params=0))))
        return nnx.merge(structure, nnx.state(self))


def check_arrival(r: jax.typing.ArrayLike, t: jax.Array) -> jax.Array:
    """Return the end times as float32 (B,). Raise InputError for another shape, or r outside [0, t]."""
    r = jnp.asarray(r, jnp.float32)
    if r.shape != t.shape:
        raise InputError(f"r {r.shape}: expected one time for each of t {t.shape}.")
    if not isinstance(r, jax.core.Tracer) and not isinstance(t, jax.core.Tracer):
        late = np.flatnonzero(~((np.asarray(r) >= 0) & (np.asarray(r) <= np.asarray(t))))
        if late.size:
            raise InputError(
                f"r={r[late[0]]:g} with t={t[late[0]]:g}: a flow map goes to an earlier time, 0 <= r <= t."
            )
    return constrain_batch(r)


def check_guidance(w: jax.typing.ArrayLike, t: jax.Array, largest: float) -> jax.Array:
    """Return the guidance scales as float32 (B,). Raise InputError for another shape, or w outside [1, largest]."""
    w = jnp.asarray(w, jnp.float32)
    if largest == 1:
        raise InputError("w is given and this model takes no guidance scale: train it with config.model.guidance_max.")
    if w.shape != t.shape:
        raise InputError(f"w {w.shape}: expected one guidance scale for each of t {t.shape}.")
    if not isinstance(w, jax.core.Tracer) and not bool(((w >= 1) & (w <= largest)).all()):
        raise InputError(
            f"w from {w.min():g} to {w.max():g}: this model was trained with scales from 1 to {largest:g}."
        )
    return constrain_batch(w)
