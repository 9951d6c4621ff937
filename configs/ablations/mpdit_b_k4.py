"""MPDiT-B with 4 blocks on fine tokens (k = 4).

    python -m mpdit_jax.train --config=configs/ablations/mpdit_b_k4.py --workdir=runs/mpdit_b_k4

The paper prints 104.8 M parameters and 13.9 GFLOPs for it. The paper reports FID 26.94 after 80 epochs, unguided. It
has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", depths=(8, 4))
