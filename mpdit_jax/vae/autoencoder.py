"""Stable Diffusion's AutoencoderKL as a Flax NNX module: images to latent moments, latents to images.

The architecture is that of "High-Resolution Image Synthesis with Latent Diffusion Models" (Rombach et al. 2022,
appendix G), with the options of later checkpoints.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mpdit_jax.vae.blocks import Conv, GroupNorm, MidBlock, Stage
from mpdit_jax.vae.config import AutoencoderConfig


class Encoder(nnx.Module):
    """The encoder: images to 2·latent_channels feature maps at 1/downsample_factor of the resolution."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], 3, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                Stage(before, width, config.layers_per_block, groups, downsample=i + 1 < len(widths), rngs=rngs)
                for i, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, attention=config.mid_block_add_attention, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, in_channels) to (B, H/f, W/f, 2·latent_channels) float32, computed in the dtype of `x`."""
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)  # (B, H/2, W/2, C)
        x = self.mid_block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)).astype(x.dtype), jnp.float32)


class Decoder(nnx.Module):
    """The decoder: latents to images at downsample_factor times the resolution."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], 3, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, attention=config.mid_block_add_attention, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                Stage(before, width, config.layers_per_block + 1, groups, upsample=i + 1 < len(widths), rngs=rngs)
                for i, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Map (B, h, w, latent_channels) to (B, h·f, w·f, out_channels) float32, computed in the dtype of `z`."""
        z = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            z = stage(z)  # (B, 2H, 2W, C)
        return self.conv_out(nnx.silu(self.conv_norm_out(z)).astype(z.dtype), jnp.float32)


class Autoencoder(nnx.Module):
    """Encoder and decoder with the 1x1 convolutions between them. It holds float32 parameters and no other state.

    `dtype` is the compute dtype of convolutions and matrix products, float32 or bfloat16; group norms and the
    attention's softmax are always in float32.
    """

    def __init__(self, config: AutoencoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        moments = 2 * config.latent_channels
        self.quant_conv = Conv(moments, moments, 1, rngs=rngs) if config.use_quant_conv else None
        self.post_quant_conv = (
            Conv(config.latent_channels, config.latent_channels, 1, rngs=rngs) if config.use_post_quant_conv else None
        )
        self.dtype = jnp.dtype(dtype)

    def moments(self, images: jax.Array) -> jax.Array:
        """Encode images (B, H, W, in_channels) in [-1, 1]; H and W are multiples of the downsample factor f.

        Return the posterior's mean and log variance (not clipped) as (B, H/f, W/f, 2·latent_channels) float32.
        """
        x = self.encoder(images.astype(self.dtype))
        if self.quant_conv is not None:
            x = self.quant_conv(x.astype(self.dtype), jnp.float32)
        return x

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decode unscaled latents (B, h, w, latent_channels).

        Return images (B, h·f, w·f, out_channels) float32, approximately in [-1, 1], not clipped.
        """
        z = latents.astype(self.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z)


def mean_and_std(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Convert moments (see `Autoencoder.moments`) to the posterior's mean and standard deviation.

    The log variance is clipped to [-30, 20], as in Stable Diffusion.
    """
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
