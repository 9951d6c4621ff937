r"""MPDiT-B with the upsampler 'conv_transpose' (mpdit_jax/model/upsample.py).

    python -m mpdit_jax.train --config=configs/ablations/upsampler_conv_transpose.py \
        --workdir=runs/upsampler_conv_transpose

The paper reports FID 29.45 after 80 epochs, unguided. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", upsampler="conv_transpose")
