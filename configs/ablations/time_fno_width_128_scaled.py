r"""An FNO time embedding of 128 channels, initialized so that its size does not depend on them.

    python -m mpdit_jax.train --config=configs/ablations/time_fno_width_128_scaled.py \
        --workdir=runs/time_fno_width_128_scaled

It is not a row of the paper: docs/fno_width.md says why it is here. Compare it with time_fno_width_32_scaled.py, which
differs in the width alone, and not with the paper's initialization, whose embedding is larger even at 32 channels. It
has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", fno_width=128, fno_init="scaled")
