"""MPDiT-XL with 4 blocks on fine tokens (k = 4).

    python -m mpdit_jax.train --config=configs/ablations/mpdit_xl_k4.py --workdir=runs/mpdit_xl_k4

The paper prints 481.2 M parameters and 53.2 GFLOPs for it. The paper reports FID 11.11 after 80 epochs, unguided. It
has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_xl", depths=(24, 4))
