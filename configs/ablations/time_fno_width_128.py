"""An FNO time embedding of 128 channels, in place of 32.

    python -m mpdit_jax.train --config=configs/ablations/time_fno_width_128.py --workdir=runs/time_fno_width_128

The paper reports that its training is unstable. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", fno_width=128)
