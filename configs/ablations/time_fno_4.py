"""MPDiT-B with an FNO time embedding of 4 layers.

    python -m mpdit_jax.train --config=configs/ablations/time_fno_4.py --workdir=runs/time_fno_4

The paper reports FID 27.37 after 80 epochs, unguided. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", fno_layers=4)
