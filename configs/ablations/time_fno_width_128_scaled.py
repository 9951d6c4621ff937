r"""An FNO time embedding of 128 channels with the size of one of 32.

    python -m mpdit_jax.train --config=configs/ablations/time_fno_width_128_scaled.py \
        --workdir=runs/time_fno_width_128_scaled

It is not a row of the paper: docs/fno_width.md says why it is here. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.recipes import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", fno_width=128, fno_init="scaled")
