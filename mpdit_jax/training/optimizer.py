"""The optimizer a config asks for."""

import optax
from ml_collections import FrozenConfigDict


def make_optimizer(config: FrozenConfigDict) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay on every parameter, by `config.optimizer` (paper, section 4.1)."""
    return optax.adamw(
        learning_rate=config.learning_rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
