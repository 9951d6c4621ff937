r"""The FNO time embedding: the fourth step of the ablation ladder, and its dense top.

    python -m mpdit_jax.train --config=configs/ablations/dit_b_2_shared_tokens_fno.py \
        --workdir=runs/dit_b_2_shared_tokens_fno

The paper prints 101.2 M parameters and 24.3 GFLOPs for it. The FID of this step is not among the figures this project
holds. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("dit_b_2", modulation="shared", condition="tokens", time_embedding="fno")
