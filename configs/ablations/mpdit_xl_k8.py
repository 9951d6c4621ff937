"""MPDiT-XL with 8 blocks on fine tokens (k = 8).

    python -m mpdit_jax.train --config=configs/ablations/mpdit_xl_k8.py --workdir=runs/mpdit_xl_k8

The paper prints 481.2 M parameters and 65.4 GFLOPs for it. The paper reports FID 9.73 after 80 epochs, unguided. It
has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_xl", depths=(20, 8))
