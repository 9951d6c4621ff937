"""The ladder's dense top at XL's size: 28 blocks on 256 tokens.

    python -m mpdit_jax.train --config=configs/ablations/dense_xl.py --workdir=runs/dense_xl

The paper prints 473.1 M parameters and 125.5 GFLOPs for it. The paper reports FID 9.22 after 80 epochs, unguided. It
has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("dit_xl_2", modulation="shared", condition="tokens", time_embedding="fno")
