"""MPDiT-B with the sinusoidal time embedding and an MLP of 3 linear layers.

    python -m mpdit_jax.train --config=configs/ablations/time_linear_3.py --workdir=runs/time_linear_3

The paper reports FID 29.71 after 80 epochs, unguided. It has not been trained with this code yet.
"""

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config


def get_config() -> ConfigDict:
    return ablation_config("mpdit_b", time_embedding="sinusoidal", sinusoidal_layers=3)
