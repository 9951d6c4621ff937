"""DiT-B/2: the first step of the paper's ablation ladder.

    python -m mpdit_jax.train --config=configs/ablations/dit_b_2.py --workdir=runs/dit_b_2

The paper prints 130.0 M parameters and 23.0 GFLOPs for it. The FID of this step is not among the figures this project
holds. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("dit_b_2")
