"""16 class tokens instead of a class vector: the third step of the ablation ladder.

    python -m mpdit_jax.train --config=configs/ablations/dit_b_2_shared_tokens.py --workdir=runs/dit_b_2_shared_tokens

The paper prints 101.9 M parameters and 24.3 GFLOPs for it. The FID of this step is not among the figures this project
holds. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("dit_b_2", modulation="shared", condition="tokens")
