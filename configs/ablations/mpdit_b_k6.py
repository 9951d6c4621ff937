"""MPDiT-B with 6 blocks on fine tokens (k = 6).

    python -m mpdit_jax.train --config=configs/ablations/mpdit_b_k6.py --workdir=runs/mpdit_b_k6

This is the base of the B rows. The paper prints 104.8 M parameters and 16.6 GFLOPs for it. The paper reports FID
24.74 after 80 epochs, unguided. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", depths=(6, 6))
