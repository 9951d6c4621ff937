"""The base of the configs in configs/ablations/: the paper's recipe for its comparisons, with one row's model."""

from ml_collections import ConfigDict

from mpdit_jax.config.base import base_config


def ablation_config(preset: str, **model: object) -> ConfigDict:
    """ImageNet at 256x256 pixels, 80 epochs in batches of 1,024 at a constant 2e-4, as the paper compares models.

    Args:
        preset: the model that the row changes.
        **model: fields of `ModelConfig` that it changes.
    """
    config = base_config()
    config.steps = 100_000  # 80 epochs of 1,281,167 images
    config.model.preset = preset
    config.model.dtype = "bfloat16"
    config.model.num_classes = 1000
    config.model.in_channels = 4
    config.model.input_size = (32, 32)
    config.model.update(model)
    config.data.name = "latents"
    config.data.path = "latents/imagenet256"
    config.data.normalization = "paper"
    config.checkpoint.keep_every = 50_000
    config.sample.every = 0
    return config
