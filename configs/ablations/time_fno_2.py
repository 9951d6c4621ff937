"""MPDiT-B with an FNO time embedding of 2 layers.

    python -m mpdit_jax.train --config=configs/ablations/time_fno_2.py --workdir=runs/time_fno_2

The paper reports FID 26.87 after 80 epochs, unguided. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", fno_layers=2)
