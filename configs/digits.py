"""scikit-learn's handwritten digits: the whole path in minutes on a laptop.

An MPDiT of levels (2, 1) on 1,797 images of 8x8x1: 0.36 M parameters, 0.008 GMACs a forward pass.

    python -m mpdit_jax.train --config=digits --workdir=runs/digits

Measured with `bash launch/quickstart.sh` on two CPU cores (AMD EPYC, AVX-512): after an installation of 35 s, 800 steps
of 64 images, the evaluations and the grid took 1:33; loss 0.448 (mean of steps 751 to 800). 1,260 images/s until the
first evaluation; each draws 200 samples at two guidance scales and compares them with the digits (docs/evaluation.md).
The picture is docs/images/digits.png; in tests/test_quickstart_quality.py a classifier judges the samples.
"""

from ml_collections import ConfigDict

from mpdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.batch_size = 64
    config.steps = 800
    config.ema_decay = 0.995  # chosen for runs of this length
    config.ema.warmup = False
    config.model.patch_sizes = (2, 1)
    config.model.depths = (3, 1)
    config.model.hidden_size = 64
    config.model.num_heads = 2
    config.model.input_size = (8, 8)
    config.model.in_channels = 1
    config.model.num_classes = 10
    config.model.class_tokens = 2
    config.data.name = "digits"
    config.data.split = "all"
    config.optimizer.learning_rate = 1e-3
    config.checkpoint.every = 200
    config.log.every = 50
    config.sample.every = 400
    config.sample.guidance_scale = 2.0
    config.eval.every = 200
    config.eval.num_samples = 200
    config.eval.guidance_scales = (1.0, 2.0)
    config.eval.features = "classifier"
    config.eval.steps = 16
    config.eval.metrics = "fd,precision,recall"
    return config
