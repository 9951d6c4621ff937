"""DiT-XL/4: a quarter of the tokens by larger patches.

    python -m mpdit_jax.train --config=configs/ablations/dit_xl_4.py --workdir=runs/dit_xl_4

The paper reports an FID of about 40. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("dit_xl_4")
