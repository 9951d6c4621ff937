"""Fashion-MNIST: the paper's 64 coarse and 256 fine tokens, on 60,000 real images."""

from ml_collections import ConfigDict

from mpdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.batch_size = 64
    config.steps = 1_000
    config.ema_decay = 0.995
    config.model.patch_sizes = (4, 2)
    config.model.depths = (5, 1)
    config.model.hidden_size = 64
    config.model.num_heads = 2
    config.model.input_size = (32, 32)
    config.model.in_channels = 1
    config.model.num_classes = 10
    config.model.class_tokens = 4
    config.data.name = "fashion_mnist"
    config.optimizer.learning_rate = 1e-3
    config.checkpoint.every = 250
    config.log.every = 50
    config.sample.every = 1_000
    config.sample.guidance_scale = 2.0
    return config
