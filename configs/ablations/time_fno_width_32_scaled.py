r"""The base's FNO time embedding of 32 channels, initialized as time_fno_width_128_scaled.py is.

    python -m mpdit_jax.train --config=configs/ablations/time_fno_width_32_scaled.py \
        --workdir=runs/time_fno_width_32_scaled

It is not a row of the paper: it tells what the initialization does from what the width does. It has not been trained
with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", fno_init="scaled")
