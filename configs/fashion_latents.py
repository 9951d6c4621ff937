"""Fashion-MNIST in latents: the way ImageNet goes, small enough for a laptop."""

from ml_collections import ConfigDict

from mpdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.batch_size = 128
    config.steps = 2_000
    config.ema_decay = 0.995
    config.model.patch_sizes = (2, 1)
    config.model.depths = (4, 2)
    config.model.hidden_size = 96
    config.model.num_heads = 3
    config.model.input_size = (8, 8)
    config.model.in_channels = 4
    config.model.num_classes = 10
    config.model.class_tokens = 4
    config.data.name = "latents"
    config.data.path = "latents/fashion"
    config.data.normalization = "manifest"
    config.optimizer.learning_rate = 1e-3
    config.checkpoint.every = 250
    config.log.every = 50
    return config
