"""MPDiT-B with the sinusoidal time embedding and an MLP of 1 linear layer.

    python -m mpdit_jax.train --config=configs/ablations/time_linear_1.py --workdir=runs/time_linear_1

The paper reports FID 28.98 after 80 epochs, unguided. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", time_embedding="sinusoidal", sinusoidal_layers=1)
