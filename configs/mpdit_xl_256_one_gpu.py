r"""MPDiT-XL on ImageNet at 256x256 pixels, on one GPU: batches of 256 in parts.

    python -m mpdit_jax.prepare --images=imagenet/train --vae=stabilityai/sd-vae-ft-ema --image_size=256 --flip=both \
        --out=latents/imagenet256
    python -m mpdit_jax.train --config=mpdit_xl_256_one_gpu --workdir=runs/mpdit_xl_256_one_gpu

Four parts of 64 images fit a card of 40 GB. --config.gradient_accumulation=8 fits one of 24 GB, and 1 one of 80 GB. By
`python -m mpdit_jax.compile --config=mpdit_xl_256_one_gpu --topology=a100-40gb:1 --no_sampler` a step needs
19.8 GiB, 14.6 GiB in eight parts and 50.4 GiB in one. JAX's pool has three quarters of a card's memory.

No step of an A100 is shorter than 0.28 s at published peaks, so that an epoch takes 23 minutes or more; its real time
has not been measured. The learning rate is the paper's for batches of 256, at 512x512 pixels. The paper trains with
batches of 1,024 on 8 GPUs (mpdit_xl_256), and this config has not been trained yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.steps = 1_200_000  # 240 epochs of 1,281,167 images
    config.batch_size = 256
    config.gradient_accumulation = 4
    config.optimizer.learning_rate = 1e-4
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
