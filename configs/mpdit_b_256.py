r"""MPDiT-B on ImageNet at 256x256 pixels.

Levels (4, 2): 6 blocks on 64 tokens and 6 on 256, of width 768.

    python -m mpdit_jax.prepare --images=imagenet/train --vae=stabilityai/sd-vae-ft-ema --image_size=256 --flip=both \
        --out=latents/imagenet256
    python -m mpdit_jax.train --config=mpdit_b_256 --workdir=runs/mpdit_b_256

The recipe is the paper's: AdamW at a constant 2e-4, batches of 1,024, weight decay 0.01, EMA 0.9999, 80 epochs.
Parameters, EMA and norms are float32, matrix products bfloat16.
The paper reports FID 24.74 for it, unguided, after 80 epochs.
It has not been trained with this code yet. On many devices add --config.mesh.fsdp=N to
split parameters and optimizer as well, and --config.gradient_accumulation=N where a batch does not fit.
"""

from ml_collections import ConfigDict

from mpdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.steps = 100_000  # 80 epochs of 1,281,167 images
    config.model.preset = "mpdit_b"
    config.model.dtype = "bfloat16"
    config.model.num_classes = 1000
    config.model.in_channels = 4
    config.model.input_size = (32, 32)
    config.data.name = "latents"
    config.data.path = "latents/imagenet256"
    config.data.normalization = "paper"
    config.checkpoint.keep_every = 50_000
    config.sample.every = 0
    return config
