r"""Fashion-MNIST in latents: the way ImageNet goes, small enough for a laptop.

An MPDiT of levels (2, 1) on 8x8 latents of 4 channels: 0.90 M parameters, 0.028 GMACs a forward pass.

    python -m mpdit_jax.prepare --images=idx:/usr/share/datasets/fashion-mnist --vae=runs/vae_fashion/vae \
        --image_size=32 --flip=both --out=latents/fashion
    python -m mpdit_jax.train --config=fashion_latents --workdir=runs/fashion_latents

The VAE is that of configs/vae_fashion.py. Measured with these commands on two CPU cores (AVX2, shared with other work):
encoding 60,000 images and their mirror images took 54 s; 2,000 steps of 128 latents took 16 minutes of processor time,
30 of wall clock at 145 latents/s, and the loss went from 1.33 (mean of steps 1 to 50) to 0.570 (steps 1,951 to 2,000).
docs/images/fashion_latents.png shows what it draws (docs/latents.md has the command): nine of ten kinds of clothes at a
glance; sandals are fragments.
"""

from ml_collections import ConfigDict

from mpdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.batch_size = 128
    config.steps = 2_000
    config.ema_decay = 0.995  # chosen for runs of this length
    config.ema.warmup = False
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
