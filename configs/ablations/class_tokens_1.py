"""MPDiT-B with m = 1 class tokens.

    python -m mpdit_jax.train --config=configs/ablations/class_tokens_1.py --workdir=runs/class_tokens_1

The paper reports FID 32.31 after 80 epochs, unguided. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", class_tokens=1)
