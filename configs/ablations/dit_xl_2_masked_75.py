"""DiT-XL/2 trained with 75 % of its tokens hidden at random from the first 24 of 28 blocks.

    python -m mpdit_jax.train --config=configs/ablations/dit_xl_2_masked_75.py --workdir=runs/dit_xl_2_masked_75

The paper reports an FID of about 100. The depth of its decoder is ours (MaskDiT's is 8 blocks more); sampling sees
every token. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.recipes import ablation_config


def get_config() -> ConfigDict:
    config = ablation_config("dit_xl_2", decoder_depth=4)
    config.mask_ratio = 0.75
    return config
