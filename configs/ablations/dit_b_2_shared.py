"""DiT-B/2 with one modulation for all blocks: the second step of the ablation ladder.

    python -m mpdit_jax.train --config=configs/ablations/dit_b_2_shared.py --workdir=runs/dit_b_2_shared

The paper prints 90.3 M parameters and 22.9 GFLOPs for it. The FID of this step is not among the figures this project
holds. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("dit_b_2", modulation="shared")
