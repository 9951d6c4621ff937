"""A small VAE on Fashion-MNIST: 32x32 pixels to 8x8 latents of 4 channels."""

from ml_collections import ConfigDict

from mpdit_jax.training.vae_config import base_vae_config


def get_config() -> ConfigDict:
    config = base_vae_config()
    config.steps = 1_500
    config.batch_size = 64
    config.learning_rate = 2e-3
    return config
