"""MPDiT-B with m = 32 class tokens.

    python -m mpdit_jax.train --config=configs/ablations/class_tokens_32.py --workdir=runs/class_tokens_32

The paper reports FID 24.47 after 80 epochs, unguided. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", class_tokens=32)
