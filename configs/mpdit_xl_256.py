r"""MPDiT-XL on ImageNet at 256x256 pixels: the paper's main model.

Levels (4, 2): 22 blocks on 64 tokens and 6 on 256, of width 1152.

    python -m mpdit_jax.prepare --images=imagenet/train --vae=stabilityai/sd-vae-ft-ema --image_size=256 --flip=both \
        --out=latents/imagenet256
    python -m mpdit_jax.train --config=mpdit_xl_256 --workdir=runs/mpdit_xl_256

The recipe is the paper's: AdamW at a constant 2e-4, batches of 1,024, weight decay 0.01, EMA 0.9999, 240 epochs.
Parameters, EMA and norms are float32, matrix products bfloat16.
The paper reports FID 7.36 for it, unguided, after 240 epochs (9.92 after 80), and 2.05 guided.
It has not been trained with this code yet. On many devices add --config.mesh.fsdp=N (16, say) to
split parameters and optimizer as well, and --config.gradient_accumulation=N where a batch does not fit.

The backward pass computes no matrix product again (remat none), and yet a step fits 16 TPU v5e chips: by
`python -m mpdit_jax.compile --config=mpdit_xl_256 --topology=v5e:4x4 --config.mesh.fsdp=16` it needs
14.6 GiB of a chip's 15.75. --config.model.remat=dots, with 0.8 % more operations, needs 8.8.
"""

from ml_collections import ConfigDict

from mpdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.steps = 300_000  # 240 epochs of 1,281,167 images
    config.model.preset = "mpdit_xl"
    config.model.dtype = "bfloat16"
    config.model.remat = "none"
    config.model.num_classes = 1000
    config.model.in_channels = 4
    config.model.input_size = (32, 32)
    config.data.name = "latents"
    config.data.path = "latents/imagenet256"
    config.data.normalization = "paper"
    config.checkpoint.keep_every = 50_000
    config.sample.every = 0
    return config
