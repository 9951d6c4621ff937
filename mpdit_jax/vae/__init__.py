"""Stable Diffusion's AutoencoderKL, which encodes images as latents and decodes them."""

from mpdit_jax.vae.autoencoder import Autoencoder
from mpdit_jax.vae.config import AutoencoderConfig
from mpdit_jax.vae.matching import check_fingerprint, decode_all
from mpdit_jax.vae.tiling import Tiling, tiles
from mpdit_jax.vae.vae import NO_VAE, PIXELS, VAE, load_vae
from mpdit_jax.vae.weights import load_folder, save_folder

__all__ = [
    "NO_VAE",
    "PIXELS",
    "VAE",
    "Autoencoder",
    "AutoencoderConfig",
    "Tiling",
    "check_fingerprint",
    "decode_all",
    "load_folder",
    "load_vae",
    "save_folder",
    "tiles",
]
