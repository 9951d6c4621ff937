"""By how much a Fréchet distance of few images is too high."""

import warnings
from collections.abc import Sequence

import numpy as np

from mpdit_jax.evaluate.extractors import metric_label
from mpdit_jax.evaluate.metrics import Moments, frechet_distance
from mpdit_jax.evaluate.statistics import MOMENTS, Statistics


def perfect_distance(real: Statistics, count: int, output: str = "pool", seed: int = 0) -> float:
    """The Fréchet distance that `count` draws from the real Gaussian itself have: how far too high so few images score.

    One draw; its spread is a few hundredths of it.
    """
    gaussian = real.gaussian(output)
    values, vectors = np.linalg.eigh((gaussian.covariance + gaussian.covariance.T) / 2)
    noise = np.random.default_rng(seed).standard_normal((count, len(values)))
    drawn = Moments.of(noise * np.sqrt(np.clip(values, 0, None)) @ vectors.T + gaussian.mean)
    return frechet_distance(gaussian.mean, gaussian.covariance, drawn.mean, drawn.covariance)


def warn_of_bias(real: Statistics, fake: Statistics, metrics: Sequence[str]) -> dict[str, float]:
    """Warn where there are fewer images than features, and tell by how much a distance of few samples is too high.

    Returns:
        What a perfect model would score with so few samples, by the distances' printed names; nothing for enough.
    """
    biases = {}
    for name, output in MOMENTS.items():
        if name not in metrics:
            continue
        dimension, label = len(real.gaussian(output).mean), metric_label(name, fake.extractor)
        if 0 < real.count < dimension:
            warnings.warn(
                f"the reference's {real.count} images are fewer than the {dimension} features of "
                f"{fake.extractor}: {label} comes out too high; give a larger one.",
                stacklevel=2,
            )
        if fake.count < dimension:
            biases[label] = perfect_distance(real, fake.count, output)
            warnings.warn(
                f"{fake.count} samples are fewer than the {dimension} features of {fake.extractor}: {label} "
                f"comes out too high, and a perfect model would score {biases[label]:.3g} with so few; draw more, and "
                "compare equal numbers only.",
                stacklevel=2,
            )
    return biases
