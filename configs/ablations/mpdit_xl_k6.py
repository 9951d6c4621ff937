"""MPDiT-XL with 6 blocks on fine tokens (k = 6).

    python -m mpdit_jax.train --config=configs/ablations/mpdit_xl_k6.py --workdir=runs/mpdit_xl_k6

The paper prints 481.2 M parameters and 59.3 GFLOPs for it. The paper reports FID 9.92 after 80 epochs, unguided. It
has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_xl", depths=(22, 6))
