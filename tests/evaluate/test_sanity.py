"""Every distance is near zero between halves of one set, and rises with every change of the images."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from mpdit_jax.evaluate.statistics import compare
from tests.evaluate.conftest import collect

ALL = ("fd", "precision", "recall", "kid")


@pytest.fixture(scope="module")
def measure(extractor, digits):
    """Return metrics of images against the first half of the digits, over a trained classifier's features."""
    images, _ = digits
    real = collect(extractor, [extractor(images[::2])], {})

    def run(fakes, *metrics):
        found = compare(real, collect(extractor, [extractor(np.asarray(fakes, np.uint8))], {}), metrics or ("fd",))
        return {name.partition("(")[0]: value for name, value in found.items() if not name.endswith("std")}

    return run


@pytest.fixture(scope="module")
def other_half(digits):
    images, labels = digits
    return images[1::2].astype(np.float64), labels[1::2]


def noisy(images, strength):
    return (images + strength * np.random.default_rng(0).standard_normal(images.shape)).clip(0, 255).round()


def blurred(images, sigma):
    return ndimage.gaussian_filter(images, (0, sigma, sigma, 0)).round()


def imbalanced(images, labels, share):
    """Return images of which class 0 has that share."""
    zeros, others = np.flatnonzero(labels == 0), np.flatnonzero(labels)
    count = len(images)
    rows = [np.resize(zeros, round(share * count)), others[: count - round(share * count)]]
    return images[np.concatenate(rows)]


def duplicated(images, distinct):
    return images[np.resize(np.random.default_rng(0).permutation(len(images))[:distinct], len(images))]


def rises(values):
    return all(second > first for first, second in itertools.pairwise(values))


def test_halves_of_one_set_are_near(measure, other_half):
    same = measure(other_half[0], "fd", "precision", "recall")
    assert same["FD"] < 2
    assert same["precision"] > 0.85
    assert same["recall"] > 0.85
    assert same["FD"] < 0.1 * measure(noisy(other_half[0], 60))["FD"]


def test_the_distances_rise_with_noise_and_precision_falls(measure, other_half):
    found = [measure(noisy(other_half[0], strength), *ALL) for strength in (0, 30, 60, 90)]
    assert rises([each["FD"] for each in found])
    assert rises([each["KD"] for each in found])
    assert rises([-each["precision"] for each in found])


def test_the_distance_rises_with_blur(measure, other_half):
    assert rises([measure(blurred(other_half[0], sigma))["FD"] for sigma in (0, 0.5, 0.8, 1.2)])


def test_the_distance_rises_with_class_imbalance(measure, other_half):
    assert rises([measure(imbalanced(*other_half, share))["FD"] for share in (0.1, 0.25, 0.4, 0.6)])


def test_the_distance_rises_with_duplicates(measure, other_half):
    assert rises([measure(duplicated(other_half[0], distinct))["FD"] for distinct in (898, 200, 60, 20)])


def test_recall_falls_with_dropped_classes_and_precision_does_not(measure, other_half):
    images, labels = other_half
    found = [measure(images[labels < kept], "fd", "precision", "recall") for kept in (10, 7, 4, 2)]
    assert rises([-each["recall"] for each in found])
    assert rises([each["FD"] for each in found])
    assert min(each["precision"] for each in found) > 0.8
