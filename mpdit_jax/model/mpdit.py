"""MPDiT: a diffusion transformer that runs most of its blocks on a few coarse tokens (arXiv 2603.26357).

    latents (B, H, W, C) ── patches of 4 ── + positions ── [class tokens | 64 coarse tokens] ── most blocks ──┐
                                                                                                          upsample
    latents (B, H, W, C) ── patches of 2 ── linear skip ──────────────────────────────────────────────────── + ──┤
                                                                                                         + positions
    velocity (B, H, W, C) ── unpatchify ── final linear ── few blocks ── [class tokens | 256 fine tokens] ────────┘

Time enters through one modulation that every block and the final layer share. Any number of levels works the same way;
one level is an isotropic transformer.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mpdit_jax.errors import InputError
from mpdit_jax.model.blocks import BlockStack, Modulation, layer_norm, modulate
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.embeddings import ClassTokens, SinusoidalTime, patchify, sincos_positions, unpatchify
from mpdit_jax.model.fno import FNOTime
from mpdit_jax.model.linear import ZEROS, linear
from mpdit_jax.model.upsample import Upsample

TIME_EMBEDDINGS = {"fno": FNOTime, "sinusoidal": SinusoidalTime}


class Level(nnx.Module):
    """The blocks at one patch size, and what brings tokens to it."""

    def __init__(self, index: int, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.patch, self.grid, self.width = config.patch_sizes[index], config.grid(index), config.hidden_size
        patch_features = self.patch * self.patch * config.in_channels
        entering, embedding = index > 0, index == 0 or config.skip
        ratio = config.patch_sizes[index - 1] // self.patch if entering else 1
        self.upsample = Upsample(ratio, config.grid(index - 1), config, rngs) if entering else None
        self.patch_embed = linear(patch_features, self.width, rngs, dtype=config.dtype) if embedding else None
        self.skip = linear(self.width, self.width, rngs, dtype=config.dtype) if entering and embedding else None
        self.blocks = BlockStack(config.depths[index], config, rngs)

    def __call__(self, tokens: jax.Array, latents: jax.Array, modulation: Modulation) -> jax.Array:
        """Carry tokens (B, m + N_coarse, D) to (B, m + N, D). On the first level the tokens are the m class tokens."""
        image = jnp.asarray(sincos_positions(self.grid, self.width), tokens.dtype)[None]  # (1, N, D)
        if self.patch_embed is not None:
            patches = self.patch_embed(patchify(latents, self.patch))  # (B, N, D)
            image = image + (patches if self.skip is None else self.skip(patches))
        if self.upsample is None:
            tokens = jnp.concatenate([tokens, image], axis=1)  # (B, m + N, D)
        else:
            tokens = self.upsample(tokens)  # (B, m + N, D)
            count = image.shape[1]
            tokens = jnp.concatenate([tokens[:, :-count], tokens[:, -count:] + image], axis=1)
        return self.blocks(tokens, modulation)


class MPDiT(nnx.Module):
    """The multi-patch diffusion transformer. Holds parameters and nothing else: no random state, no mode.

    `model(x, t, y)` is the velocity. Its three parts are public because a sampler computes `modulation` for all steps
    at once and `class_embedding` once: `model.velocity(x, model.modulation(t), model.class_embedding(y))`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        width, patch = config.hidden_size, config.patch_sizes[-1]
        self.time_embedding = TIME_EMBEDDINGS[config.time_embedding](config, rngs)
        self.time_modulation = linear(width, 6 * width, rngs, kernel_init=ZEROS)
        self.class_embedding = ClassTokens(config, rngs)
        self.levels = nnx.List([Level(index, config, rngs) for index in range(len(config.patch_sizes))])
        self.final = linear(width, patch * patch * config.in_channels, rngs, kernel_init=ZEROS)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the latents."""
        return (*self.config.input_size, self.config.in_channels)

    @property
    def num_classes(self) -> int:
        """Number of classes; as a label, the null class."""
        return self.config.num_classes

    def __call__(self, x: jax.typing.ArrayLike, t: jax.typing.ArrayLike, y: jax.typing.ArrayLike) -> jax.Array:
        """Velocity dz/dt at latents `x`, time `t` (0 = data, 1 = noise) and class `y`.

        Args:
            x: noisy latents, float32 (B, H, W, C).
            t: times in [0, 1], float32 (B,).
            y: labels in [0, num_classes], int32 (B,); `num_classes` is the null class.

        Returns:
            float32 (B, H, W, C).

        Raises:
            InputError: a shape does not fit the model, or labels that are not whole numbers.
        """
        x, t, y = jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32), jnp.asarray(y)
        if x.shape[1:] != self.input_shape or t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            height, width, channels = self.input_shape
            raise InputError(
                f"x {x.shape}, t {t.shape}, y {y.shape}: this model takes x (B, {height}, {width}, {channels}), "
                "t (B,) and y (B,), channels last."
            )
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise InputError(f"y has dtype {y.dtype}: expected labels, whole numbers from 0 to {self.num_classes}.")
        return self.velocity(x, self.modulation(t), self.class_embedding(y))

    def modulation(self, t: jax.Array) -> Modulation:
        """The six modulation vectors, float32 (B, D) each, of times (B,)."""
        vectors = self.time_modulation(nnx.silu(self.time_embedding(t)))  # (B, 6 * D)
        return Modulation(*jnp.split(vectors, 6, axis=-1))

    def velocity(self, x: jax.Array, modulation: Modulation, class_tokens: jax.Array) -> jax.Array:
        """The trunk: latents (B, H, W, C), modulation of (B, D) vectors, class tokens (B, m, D) to (B, H, W, C)."""
        tokens = class_tokens
        for level in self.levels:
            tokens = level(tokens, x.astype(class_tokens.dtype), modulation)
        image = tokens[:, class_tokens.shape[1] :].astype(jnp.float32)  # (B, N, D)
        image = self.final(modulate(layer_norm(image), modulation.shift2, modulation.scale2))  # (B, N, p * p * C)
        return unpatchify(image, self.levels[-1].patch, self.levels[-1].grid)

    def astype(self, dtype: str) -> "MPDiT":
        """A copy for inference that computes in "float32" or "bfloat16".

        The weights of the levels and class tokens are stored in `dtype`, so that a loop over steps does not convert
        them again and again; the others stay float32, as everything does in training. The values are those of a model
        made with `dtype`.

        Raises:
            ConfigError: another dtype.
        """
        config = self.config.replace(dtype=dtype)
        structure = nnx.graphdef(nnx.eval_shape(lambda: MPDiT(config, nnx.Rngs(params=0))))
        model = nnx.merge(structure, nnx.state(self))
        for part in (model.levels, model.class_embedding):
            nnx.update(part, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(part)))
        return model
