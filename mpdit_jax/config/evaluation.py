"""Names of metrics, and validation of `config.eval`."""

from collections.abc import Sequence
from typing import Any

from mpdit_jax.errors import ConfigError, InputError

MOST_REAL = 50_000
"""Images of a run's own data that are compared with, unless a reference is named."""
PREPROCESSINGS = ("tensorflow", "pytorch_fid")
"""How Inception's input may be resized and scaled."""
METRICS = ("fd", "sfd", "is", "precision", "recall", "kid")
ALIASES = {"fid": "fd", "sfid": "sfd"}
"""Names that some metrics have with Inception, and with no other network."""


def metric_names(text: str) -> list[str]:
    """Return the names in a list with commas, as given."""
    return [part.strip() for part in text.split(",") if part.strip()]


def choose_metrics(text: str, features: str) -> tuple[str, ...]:
    """Return the metrics in a list with commas, aliases resolved; without a text the usual ones of the extractor.

    Raises:
        InputError: an unknown metric, or FID with a network other than Inception.
    """
    if not text:
        return ("fd", "sfd", "is", "precision", "recall") if features == "inception" else ("fd", "precision", "recall")
    names = metric_names(text)
    for name in names or [text]:
        if name not in METRICS and name not in ALIASES:
            raise InputError(f"metrics={name}: expected some of {', '.join(METRICS)}; fid and sfid with Inception.")
        if name in ALIASES and features != "inception":
            raise InputError(
                f"metrics={name}: {name} is of the Inception network alone, and features={features} gives another "
                f"Fréchet distance; ask for {ALIASES[name]}, which is printed as FD({features.partition(':')[0]})."
            )
    return tuple(ALIASES.get(name, name) for name in names)


def fewest_images(metrics: Sequence[str], k: int = 3) -> int:
    """Images that each set needs for these metrics: two for a covariance, k + 1 for a k-th neighbour."""
    return k + 1 if {"precision", "recall"} & set(metrics) else 2


def check_eval(config: Any) -> None:
    """Raise ConfigError for an impossible setting of `config.eval`."""
    if config.every < 0:
        raise ConfigError(f"config.eval.every={config.every}: expected 0 (never) or more steps.")
    for name in ("num_samples", "steps", "batch_size", "classifier_steps"):
        if config[name] < 1:
            raise ConfigError(f"config.eval.{name}={config[name]}: expected 1 or more.")
    scales = config.guidance_scales
    if not scales or not all(isinstance(scale, int | float) and 0 <= scale < 1e6 for scale in scales):
        raise ConfigError(f"config.eval.guidance_scales={scales}: expected numbers of 0 or more, such as 1.0,1.5.")
    try:
        metrics = choose_metrics(config.metrics, config.features)
    except InputError as error:
        raise ConfigError(f"config.eval.{error}") from error
    if config.preprocessing not in PREPROCESSINGS:
        expected = ", ".join(PREPROCESSINGS)
        raise ConfigError(f"config.eval.preprocessing={config.preprocessing!r}: expected one of {expected}.")
    if config.features != "inception" and config.preprocessing != "tensorflow":
        raise ConfigError(
            f"config.eval.preprocessing={config.preprocessing} is for features=inception only, and this is "
            f"config.eval.features={config.features}: leave it at tensorflow, or set features to inception."
        )
    if config.features != "inception" and "sfd" in metrics:
        raise ConfigError(
            f"config.eval.metrics={config.metrics}: sfd needs spatial features, which only Inception has, and "
            f"this is config.eval.features={config.features}: leave sfd out."
        )
    fewest = fewest_images(metrics)
    if config.num_samples < fewest:
        wanted = f"{fewest} or more for config.eval.metrics={config.metrics}"
        raise ConfigError(f"config.eval.num_samples={config.num_samples}: expected {wanted}.")
