"""The optimizer and learning-rate schedule of a config."""

from collections.abc import Callable

import optax
from ml_collections import FrozenConfigDict

from mpdit_jax.model.parameters import Parameters

_MUON_RMS = 0.2  # RMS of an update relative to the learning rate, as AdamW's is in practice (Moonlight)


def make_optimizer(config: FrozenConfigDict) -> optax.GradientTransformation:
    """Return the optimizer of `config.optimizer`; the paper's is AdamW at a constant rate, unclipped (section 4.1)."""
    optimizer = OPTIMIZERS[config.name](config, make_schedule(config))
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer


def make_schedule(config: FrozenConfigDict) -> optax.Schedule:
    """Return the learning rate as a function of the step: linear for `warmup_steps`, then the named schedule."""
    after = SCHEDULES[config.schedule](config)
    if not config.warmup_steps:
        return after
    warm_up = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warm_up, after], [config.warmup_steps])


SCHEDULES: dict[str, Callable[[FrozenConfigDict], optax.Schedule]] = {
    "constant": lambda config: optax.constant_schedule(config.learning_rate),
    "cosine": lambda config: optax.cosine_decay_schedule(
        config.learning_rate, config.decay_steps, alpha=config.end_learning_rate / config.learning_rate
    ),
    "linear": lambda config: optax.linear_schedule(config.learning_rate, config.end_learning_rate, config.decay_steps),
}


def _adamw(config: FrozenConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)


def _muon(config: FrozenConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon on the blocks' matrices, AdamW with Nesterov's momentum on everything else, at the same learning rate."""
    return optax.contrib.muon(
        schedule,
        eps=config.eps,  # of AdamW, and of the norm that Muon divides an update by
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_block_matrices,
        consistent_rms=_MUON_RMS,
    )


def _block_matrices(parameters: Parameters) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # (layers, in, out)
    return {path: matrix if ".blocks." in path and path.endswith(".kernel") else None for path in parameters}


OPTIMIZERS: dict[str, Callable[[FrozenConfigDict, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
}
