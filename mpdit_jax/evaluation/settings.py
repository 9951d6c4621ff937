"""The settings of `config.eval`, and their checks."""

from typing import Any

from mpdit_jax.errors import ConfigError

METRICS = ("fd", "sfd", "is", "precision", "recall", "kid")


def check_eval(config: Any) -> None:
    """Raise ConfigError for settings of `config.eval` that cannot be."""
    if config.every < 0:
        raise ConfigError(f"config.eval.every={config.every}: expected 0 (never) or more steps.")
    for name in ("num_samples", "steps", "batch_size", "classifier_steps"):
        if config[name] < 1:
            raise ConfigError(f"config.eval.{name}={config[name]}: expected 1 or more.")
    scales = config.guidance_scales
    if not scales or not all(isinstance(scale, int | float) and 0 <= scale < 1e6 for scale in scales):
        raise ConfigError(f"config.eval.guidance_scales={scales}: expected numbers of 0 or more, such as 1.0,1.5.")
    if not config.metrics or not set(config.metrics) <= set(METRICS):
        raise ConfigError(f"config.eval.metrics={config.metrics}: expected some of {', '.join(METRICS)}.")
