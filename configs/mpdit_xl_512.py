r"""MPDiT-XL on ImageNet at 512x512 pixels.

Levels (4, 2): 22 blocks on 256 tokens and 6 on 1,024, of width 1152.

    python -m mpdit_jax.prepare --images=imagenet/train --vae=stabilityai/sd-vae-ft-ema --image_size=512 --flip=both \
        --out=latents/imagenet512
    python -m mpdit_jax.train --config=mpdit_xl_512 --workdir=runs/mpdit_xl_512

The recipe is the paper's: AdamW at a constant 1e-4, batches of 256, weight decay 0.01, EMA 0.9999, 120 epochs.
Parameters, EMA and norms are float32, matrix products bfloat16.
The paper reports FID 9.24 for it, unguided, after 120 epochs, and 2.47 guided.
It has not been trained with this code yet. On many devices add --config.mesh.fsdp=N to
split parameters and optimizer as well, and --config.gradient_accumulation=N where a batch does not fit.
"""

from ml_collections import ConfigDict

from mpdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.steps = 600_000  # 120 epochs of 1,281,167 images
    config.batch_size = 256
    config.optimizer.learning_rate = 1e-4
    config.model.preset = "mpdit_xl"
    config.model.dtype = "bfloat16"
    config.model.num_classes = 1000
    config.model.in_channels = 4
    config.model.input_size = (64, 64)
    config.data.name = "latents"
    config.data.path = "latents/imagenet512"
    config.data.normalization = "paper"
    config.checkpoint.keep_every = 50_000
    config.sample.every = 0
    return config
