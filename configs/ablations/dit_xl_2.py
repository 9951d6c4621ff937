"""DiT-XL/2, the isotropic baseline.

    python -m mpdit_jax.train --config=configs/ablations/dit_xl_2.py --workdir=runs/dit_xl_2

The paper prints 118.66 GFLOPs for it. The paper quotes FID 9.62 for it after 1,400 epochs, with DiT's own objective;
this code trains by flow matching, which makes it sit_xl_2.py. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("dit_xl_2")
