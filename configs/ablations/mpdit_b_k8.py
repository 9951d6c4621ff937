"""MPDiT-B with 8 blocks on fine tokens (k = 8).

    python -m mpdit_jax.train --config=configs/ablations/mpdit_b_k8.py --workdir=runs/mpdit_b_k8

The paper prints 104.8 M parameters and 19.3 GFLOPs for it. The paper reports FID 24.62 after 80 epochs, unguided. It
has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", depths=(4, 8))
