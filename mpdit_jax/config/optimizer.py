"""Names that `config.optimizer` may hold, and its checks; `train.optimizer` builds what they name."""

from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.errors import ConfigError
from mpdit_jax.validation import suggest

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine", "linear")


def check_optimizer(config: ConfigDict | FrozenConfigDict) -> None:
    """Raise ConfigError unless names are known and a schedule that ends says when."""
    for field, known in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if config[field] not in known:
            raise ConfigError(
                f"config.optimizer.{field}={config[field]!r}{suggest(config[field], known)}: expected one of "
                f"{', '.join(known)}."
            )
    if config.schedule != "constant" and config.decay_steps < 1:
        raise ConfigError(
            f"config.optimizer.decay_steps={config.decay_steps}: expected how many steps after the warm-up the "
            f"{config.schedule} schedule takes to reach end_learning_rate."
        )
