r"""MPDiT-L on ImageNet at 256x256 pixels.

Levels (4, 2): 18 blocks on 64 tokens and 6 on 256, of width 1024.

    python -m mpdit_jax.prepare --images=imagenet/train --vae=stabilityai/sd-vae-ft-ema --image_size=256 --flip=both \
        --out=latents/imagenet256
    python -m mpdit_jax.train --config=mpdit_l_256 --workdir=runs/mpdit_l_256

The recipe is the paper's: AdamW at a constant 2e-4, batches of 1,024, weight decay 0.01, EMA 0.9999, 240 epochs.
Parameters, EMA and norms are float32, matrix products bfloat16.
The paper's main tables report no figure for it.
It has not been trained with this code yet. On many devices add --config.mesh.fsdp=N to
split parameters and optimizer as well, and --config.gradient_accumulation=N where a batch does not fit.
"""

from ml_collections import ConfigDict

from mpdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.steps = 300_000  # 240 epochs of 1,281,167 images
    config.model.preset = "mpdit_l"
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
