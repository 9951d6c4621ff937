"""Bias of Fréchet distances with few images: warnings, and the score of a perfect model."""

from collections.abc import Mapping, Sequence

import numpy as np

from mpdit_jax.evaluate.extractors import metric_label
from mpdit_jax.evaluate.metrics import Moments, frechet_distance
from mpdit_jax.evaluate.statistics import MOMENTS, Statistics


def perfect_distance(real: Statistics, count: int, output: str = "pool", seed: int = 0) -> float:
    """Return a perfect model's score: the Fréchet distance of the real Gaussian and `count` draws from it."""
    gaussian = real.gaussian(output)
    values, vectors = np.linalg.eigh((gaussian.covariance + gaussian.covariance.T) / 2)
    noise = np.random.default_rng(seed).standard_normal((count, len(values)))
    drawn = Moments.of(noise * np.sqrt(np.clip(values, 0, None)) @ vectors.T + gaussian.mean)
    return frechet_distance(gaussian.mean, gaussian.covariance, drawn.mean, drawn.covariance)


def few_images(metrics: Sequence[str], extractor: str, outputs: Mapping[str, int], count: int, whose: str) -> list[str]:
    """Return a warning for each distance of a set with fewer images than features; a `count` of 0 is unknown.

    `outputs` are the extractor's dimensions, and `whose` names the set in the warning, such as "100 samples".
    """
    return [
        f"{whose} are fewer than the {outputs[output]} features of {extractor}: {metric_label(name, extractor)} comes "
        "out too high; give more, and compare equal numbers only."
        for name, output in MOMENTS.items()
        if name in metrics and 0 < count < outputs.get(output, 0)
    ]


def describe_bias(real: Statistics, count: int, metrics: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """Return warnings of too few images, and a perfect model's score for each biased distance by printed name."""
    outputs = {output: len(gaussian.mean) for output, gaussian in real.gaussians.items()}
    notes = few_images(metrics, real.extractor, outputs, real.count, f"the reference's {real.count} images")
    notes += few_images(metrics, real.extractor, outputs, count, f"{count} samples")
    scores = {
        metric_label(name, real.extractor): perfect_distance(real, count, output)
        for name, output in MOMENTS.items()
        if name in metrics and count < outputs[output]
    }
    notes += [f"a perfect model would have {label} {value:.3g} with {count} samples" for label, value in scores.items()]
    return notes, scores
