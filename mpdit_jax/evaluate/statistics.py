"""Statistics of a set of images under an extractor, and the metrics of two sets."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpdit_jax.config.evaluation import fewest_images
from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.extractors import Extractor, metric_label
from mpdit_jax.evaluate.metrics import Moments, frechet_distance, inception_score, kernel_distance, precision_recall

OF_SINGLE_IMAGES = {"precision", "recall", "kid"}
"""Metrics that need the features of every image."""
MOMENTS = {"fd": "pool", "sfd": "spatial"}
"""Fréchet distances, with the outputs whose Gaussians they compare."""
KID_SUBSETS = 100
_KID_SUBSET = 1000  # images


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d), float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of one set of images under one extractor."""

    extractor: str  # its name
    fingerprint: str  # of the extractor; "" if a file does not say, as files of other projects
    count: int  # number of images; 0 if a file does not say
    gaussians: dict[str, Gaussian]  # by output, "pool" and Inception's "spatial"; empty for fewer than two images
    features: np.ndarray | None = None  # `pool` of each image (n, d), float32; None if a file has moments only
    probs: np.ndarray | None = None  # softmax outputs (n, classes)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)  # description for reports, by kind of set
    file: dict[str, Any] = dataclasses.field(default_factory=dict)  # path, digest and fingerprint of a read file

    def gaussian(self, output: str) -> Gaussian:
        """Return the Gaussian of an output; raises InputError if it is missing."""
        if output not in self.gaussians:
            raise InputError(f"{self._name()} has no statistics of the {output} features: give the images themselves.")
        return self.gaussians[output]

    def single(self, metric: str) -> np.ndarray:
        """Return the features (n, d) of every image; raises InputError if they were not kept."""
        if self.features is None:
            raise InputError(
                f"{self._name()} has moments only, and for {metric} single images are compared: give images, or "
                "statistics saved with --save_features."
            )
        return self.features

    def softmax(self) -> np.ndarray:
        """Return the probabilities (n, classes) of every image; raises InputError if they were not kept."""
        if self.probs is None:
            raise InputError(f"{self._name()} has no class probabilities: the Inception Score needs images.")
        return self.probs

    def _name(self) -> str:
        return str(self.file.get("path") or self.about.get("path") or "the set of images")


def from_moments(
    extractor: Extractor,
    moments: dict[str, Moments],
    features: np.ndarray | None,
    probs: np.ndarray | None,
    about: dict[str, Any],
) -> Statistics:
    """Build statistics from merged moments."""
    gaussians = {name: Gaussian(part.mean, part.covariance) for name, part in moments.items() if part.count > 1}
    return Statistics(extractor.name, extractor.fingerprint, moments["pool"].count, gaussians, features, probs, about)


def check_metrics(names: Sequence[str], extractor: Extractor) -> None:
    """Raise InputError unless the extractor has the output that each metric is computed from."""
    for name in names:
        output = {"sfd": "spatial", "is": "probs"}.get(name, "pool")
        if output not in extractor.outputs:
            raise InputError(f"metrics={name}: {extractor.name} has no {output} output; leave that metric out.")


def check_reference(reference: Statistics, metrics: Sequence[str]) -> None:
    """Raise InputError unless the reference has the moments and features that metrics need."""
    for name in metrics:
        if name in MOMENTS:
            reference.gaussian(MOMENTS[name])
        if name in OF_SINGLE_IMAGES:
            reference.single(name)


def check_count(count: int, metrics: Sequence[str], k: int, where: str) -> None:
    """Raise InputError unless a set has enough images for metrics; `where` follows the number in the sentence."""
    fewest = fewest_images(metrics, k)
    if count < fewest:
        neighbours = {"precision", "recall"} & set(metrics)
        what = f"precision and recall with k={k} need" if neighbours else "a covariance needs"
        raise InputError(f"{what} {fewest} images or more in each set: there are {count} {where}.")


def check_same_size(reference: Mapping[str, Any], samples: Mapping[str, Any]) -> None:
    """Raise InputError if two sets are known to differ in height or width, by their `Statistics.about`."""
    sizes = [tuple(about.get("shape", ()))[:2] for about in (reference, samples)]
    if all(sizes) and sizes[0] != sizes[1]:
        (height, width), (their_height, their_width) = sizes[1], sizes[0]
        raise InputError(
            f"the samples are {height}x{width} pixels and the reference is {their_height}x{their_width}: metrics "
            "compare one size only; give a reference of that size."
        )


def compare(
    real: Statistics, fake: Statistics, metrics: Sequence[str], *, k: int = 3, splits: int = 10, seed: int = 0
) -> dict[str, float]:
    """Return metrics by printed name, with a standard deviation as "NAME std"; raises InputError if data is missing."""
    results: dict[str, float] = {}
    for name, output in MOMENTS.items():
        if name in metrics:
            first, second = real.gaussian(output), fake.gaussian(output)
            value = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
            results[metric_label(name, fake.extractor)] = value
    if "is" in metrics:
        probs, label = fake.softmax(), metric_label("is", fake.extractor)
        results[label], results[f"{label} std"] = inception_score(probs, min(splits, len(probs)))
    if {"precision", "recall"} & set(metrics):
        pair = precision_recall(real.single("precision and recall"), fake.single("precision and recall"), k)
        for name, value in zip(("precision", "recall"), pair, strict=True):
            if name in metrics:
                results[metric_label(name, fake.extractor)] = value
    if "kid" in metrics:
        sets, size = (real.single("KID"), fake.single("KID")), kid_subset_size(real, fake)
        label = metric_label("kid", fake.extractor)
        results[label], results[f"{label} std"] = kernel_distance(
            *sets, subsets=KID_SUBSETS, subset_size=size, seed=seed
        )
    return results


def kid_subset_size(real: Statistics, fake: Statistics) -> int:
    """Return the size of KID's subsets: 1,000 images, or half of the smaller set."""
    fewest = min(len(real.single("KID")), len(fake.single("KID")))
    return _KID_SUBSET if fewest >= _KID_SUBSET else max(2, fewest // 2)
