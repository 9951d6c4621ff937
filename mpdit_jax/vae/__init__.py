"""Stable Diffusion's AutoencoderKL, which encodes images as latents and decodes them."""

from mpdit_jax.vae.autoencoder import Autoencoder as Autoencoder
from mpdit_jax.vae.config import AutoencoderConfig as AutoencoderConfig
from mpdit_jax.vae.matching import check_fingerprint as check_fingerprint
from mpdit_jax.vae.matching import decode_all as decode_all
from mpdit_jax.vae.tiling import Tiling as Tiling
from mpdit_jax.vae.tiling import tiles as tiles
from mpdit_jax.vae.vae import NO_VAE as NO_VAE
from mpdit_jax.vae.vae import PIXELS as PIXELS
from mpdit_jax.vae.vae import VAE as VAE
from mpdit_jax.vae.vae import load_vae as load_vae
from mpdit_jax.vae.weights import load_folder as load_folder
from mpdit_jax.vae.weights import save_folder as save_folder
