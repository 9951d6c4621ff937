"""Distances equal closed forms, scipy, and what torch-fidelity computes."""

import numpy as np
import pytest
import scipy.linalg

from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.metrics import Moments, frechet_distance, inception_score, kernel_distance
from tests.evaluate.torch_references import import_torchvision


def gaussian(seed, dimension, count=None):
    random = np.random.default_rng(seed)
    x = random.standard_normal((count or 3 * dimension, dimension)) @ random.standard_normal((dimension, dimension))
    return x + random.standard_normal(dimension)


def moments(x):
    found = Moments.of(x)
    return found.mean, found.covariance


def test_frechet_distance_of_diagonal_gaussians_is_known():
    a, b, mean = np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 2.0]), np.array([1.0, -2.0, 0.5])
    expected = mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.zeros(3), np.diag(a), mean, np.diag(b)) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_a_scaled_gaussian_is_known():
    mean, cov = moments(gaussian(0, 40))
    expected = 4 * mean @ mean + 4 * np.trace(cov)  # x and 3x: |2m|² + (3 - 1)² tr C
    assert frechet_distance(mean, cov, 3 * mean, 9 * cov) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_is_symmetric_invariant_to_rotation_and_zero_for_equals():
    (m1, c1), (m2, c2) = moments(gaussian(0, 30)), moments(gaussian(1, 30))
    turn = np.linalg.qr(gaussian(2, 30))[0][:30]
    turn = np.linalg.qr(turn)[0]
    there = frechet_distance(m1, c1, m2, c2)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(there, rel=1e-10)
    assert frechet_distance(turn @ m1, turn @ c1 @ turn.T, turn @ m2, turn @ c2 @ turn.T) == pytest.approx(
        there, rel=1e-9
    )
    assert 0 <= frechet_distance(m1, c1, m1, c1) < 1e-6 * np.trace(c1)


@pytest.mark.parametrize("count", [300, 25])  # 25 images of 60 features: singular covariances
def test_frechet_distance_equals_scipys_matrix_root(count):
    (m1, c1), (m2, c2) = moments(gaussian(3, 60, count)), moments(gaussian(4, 60, count))
    ridge = 1e-10 * np.eye(60) if count < 60 else 0
    root = scipy.linalg.sqrtm((c1 + ridge) @ (c2 + ridge)).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-4 if count < 60 else 1e-9)


def test_inception_score_of_certain_and_uncertain_classifiers_is_known():
    certain = np.eye(10)[np.arange(1000) % 10]
    assert inception_score(certain) == pytest.approx((10.0, 0.0))
    assert inception_score(np.full((1000, 10), 0.1)) == pytest.approx((1.0, 0.0))
    # Sorted by class, a tenth knows one class each.
    assert inception_score(certain[np.argsort(np.arange(1000) % 10)])[0] == pytest.approx(1.0)


def test_kernel_distance_equals_its_definition_and_has_no_bias():
    x, y = gaussian(0, 8, 60), gaussian(1, 8, 60)
    kernel = lambda a, b: (a @ b / 8 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(60) for j in range(60) if i != j]
    within = [np.mean([kernel(s[i], s[j]) for i, j in pairs]) for s in (x, y)]
    expected = sum(within) - 2 * np.mean([[kernel(a, b) for b in y] for a in x])
    assert kernel_distance(x, y, subsets=1, subset_size=60)[0] == pytest.approx(expected, rel=1e-9)
    same = np.random.default_rng(0).standard_normal((2, 4000, 8))
    mean, spread = kernel_distance(*same, subsets=50, subset_size=200)
    assert abs(mean) < spread


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4)), "one extractor for both"),
    (lambda: frechet_distance(np.zeros(3), np.eye(4), np.zeros(3), np.eye(3)), "cov1 of shape (4, 4)"),
    (lambda: frechet_distance(np.full(3, np.nan), np.eye(3), np.zeros(3), np.eye(3)), "mean1"),
    (lambda: frechet_distance(np.zeros(3), np.triu(np.ones((3, 3))), np.zeros(3), np.eye(3)), "not symmetric"),
    (lambda: frechet_distance(np.zeros(3), -np.eye(3), np.zeros(3), np.eye(3)), "eigenvalue -1"),
    (lambda: frechet_distance(np.zeros(2), np.diag([1, 0]), np.zeros(2), np.diag([1, -1])), "cov2 has the eigen"),
    (lambda: kernel_distance(np.full((9, 2), np.nan), np.zeros((9, 2)), subset_size=4), "real features hold NaN"),
    (lambda: kernel_distance(np.zeros((9, 2)), np.full((9, 2), np.inf), subset_size=4), "fake features hold NaN"),
    (lambda: inception_score(np.ones((20, 10))), "rows that sum to 1"),
    (lambda: inception_score(np.full((5, 10), 0.1)), "splits=10 of 5 images"),
    (lambda: kernel_distance(np.zeros((9, 2)), np.zeros((9, 2))), "2 to 9 images"),
])  # fmt: skip
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(InputError) as caught:
        call()
    assert sentence in str(caught.value)


@pytest.mark.parity
def test_torch_fidelity_computes_the_same_from_the_same_features():
    import_torchvision()
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = gaussian(5, 64, 500).astype(np.float32), gaussian(6, 64, 400).astype(np.float32)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(s)) for s in (x, y)), verbose=False)
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)

    logits = np.random.default_rng(0).standard_normal((503, 12)).astype(np.float32) * 3
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    mean, std = inception_score(probs)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-3)

    theirs = kid_features_to_metric(
        torch.from_numpy(x[:400]), torch.from_numpy(y), kid_subsets=1, kid_subset_size=400, verbose=False
    )
    ours, _ = kernel_distance(x[:400], y, subsets=1, subset_size=400)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
