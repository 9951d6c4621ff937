"""SiT-XL/2: the network of DiT-XL/2 trained by flow matching, as everything is that this code trains.

    python -m mpdit_jax.train --config=configs/ablations/sit_xl_2.py --workdir=runs/sit_xl_2

The paper prints 118.66 GFLOPs for it. The paper quotes FID 18.04 after 80 epochs. It has not been trained with this
code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("dit_xl_2")
