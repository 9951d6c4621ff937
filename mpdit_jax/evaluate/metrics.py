"""Distances between two sets of images from an extractor's features: arrays in, numbers out.

`precision_recall` (`neighbours.py`) and the moments (`moments.py`) are exported here as well.
"""

from collections.abc import Sequence

import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.moments import Moments, merge_processes
from mpdit_jax.evaluate.neighbours import precision_recall

__all__ = ["Moments", "frechet_distance", "inception_score", "kernel_distance", "merge_processes", "precision_recall"]


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians: |m1 - m2|² + tr C1 + tr C2 - 2 tr (C1 C2)^½.

    This is FID on Inception's pool_3 and sFID on its spatial features (Heusel et al., 2017; Nash et al., 2021). The
    trace of the root is that of (R C2 R)^½ with R = C1^½, a symmetric positive product whose eigenvalues are real, so
    that nothing depends on how a general matrix root treats singular covariances (which fewer images than features
    always have). Eigenvalues that rounding makes negative count as 0.

    Args:
        mean1: (d,), any real dtype; computed in float64.
        cov1: (d, d), symmetric.
        mean2: as mean1.
        cov2: as cov1.

    Raises:
        InputError: shapes that do not fit, values that are not finite, a matrix that is no covariance.
    """
    means = [_vector(mean1, "mean1"), _vector(mean2, "mean2")]
    if len(means[0]) != len(means[1]):
        raise InputError(
            f"features of length {len(means[0])} and {len(means[1])} have no distance: use one extractor for both."
        )
    covariances = [_covariance(cov1, "cov1", len(means[0])), _covariance(cov2, "cov2", len(means[0]))]
    # Scaled by a power of two, which is exact: products of covariances overflow long before the covariances do.
    exponent = int(np.frexp(max(np.abs(covariance).max() for covariance in covariances))[1])
    covariances = [np.ldexp(covariance, -exponent) for covariance in covariances]
    difference = means[0] - means[1]
    values, vectors = np.linalg.eigh(covariances[0])
    _check_positive(np.ldexp(values, exponent), "cov1")
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T  # (d, d)
    # Checked by its own eigenvalues: the product hides directions in which the first has no spread.
    _check_positive(np.ldexp(np.linalg.eigvalsh(covariances[1]), exponent), "cov2")
    product = root @ covariances[1] @ root
    spectrum = np.linalg.eigvalsh((product + product.T) / 2)
    trace = np.sqrt(np.clip(spectrum, 0, None)).sum()
    total = difference @ difference + np.ldexp(
        np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * trace, exponent
    )
    return float(max(total, 0.0))  # of equal Gaussians, rounding may leave -1e-12


def inception_score(probs: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over the splits of exp E KL(p(y|x) ‖ p(y)) (Salimans et al., 2016).

    Args:
        probs: softmax outputs (N, classes), rows that sum to 1, in the order the images were drawn in: samples that
            are sorted by class give another score, in everybody's implementation.
        splits: contiguous parts, each with its own p(y).

    Raises:
        InputError: no probabilities, or fewer images than splits.
    """
    p = np.asarray(probs, np.float64)
    if (
        p.ndim != 2
        or not np.isfinite(p).all()
        or p.min(initial=0) < 0
        or np.abs(p.sum(axis=1) - 1).max(initial=0) > 1e-3
    ):
        raise InputError(f"probs of shape {p.shape}: expected softmax outputs (images, classes), rows that sum to 1.")
    if splits < 1 or len(p) < splits:
        raise InputError(f"splits={splits} of {len(p)} images: expected 1 or more, and an image or more in each.")
    scores = []
    for start, end in ((i * len(p) // splits, (i + 1) * len(p) // splits) for i in range(splits)):
        part = p[start:end]
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(part > 0, part * (np.log(part) - np.log(part.mean(axis=0))), 0.0)
        scores.append(np.exp(terms.sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    real: np.ndarray, fake: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: mean and standard deviation over random subsets of the unbiased squared maximum mean discrepancy.

    The kernel is (x·y / d + 1)³ (Bińkowski et al., 2018). Unlike FID its expectation does not depend on the number of
    images.

    Args:
        real: features (N, d).
        fake: features (M, d).
        subsets: how many pairs of subsets.
        subset_size: images in each.
        seed: of the choice of subsets.

    Raises:
        InputError: other shapes, values that are not finite, or fewer images than a subset has.
    """
    sets: Sequence[np.ndarray] = [np.asarray(real), np.asarray(fake)]
    if any(x.ndim != 2 for x in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise InputError(f"features {sets[0].shape} and {sets[1].shape}: expected (N, d) and (M, d).")
    for name, features in zip(("real", "fake"), sets, strict=True):
        if not np.isfinite(features).all():
            raise InputError(f"the {name} features hold NaN or Inf: leave those images out.")
    fewest = min(map(len, sets))
    if subsets < 1 or not 2 <= subset_size <= fewest:
        raise InputError(
            f"subsets={subsets} of subset_size={subset_size}: expected 1 or more, of 2 to {fewest} images, the "
            "smaller set's number."
        )
    random, found = np.random.default_rng(seed), []
    for _ in range(subsets):
        x, y = (s[random.choice(len(s), subset_size, replace=False)].astype(np.float64) for s in sets)
        xx, yy, xy = _polynomial(x, x), _polynomial(y, y), _polynomial(x, y)
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (subset_size * (subset_size - 1))
        found.append(within - 2 * xy.mean())
    return float(np.mean(found)), float(np.std(found))


def _polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base: np.ndarray = x @ y.T / x.shape[1] + 1
    return base * base * base  # ten times as fast as a power


def _vector(mean: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(mean, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InputError(f"{name} of shape {values.shape}: expected a vector of finite numbers.")
    return values


def _covariance(cov: np.ndarray, name: str, dimension: int) -> np.ndarray:
    values = np.asarray(cov, np.float64)
    if values.shape != (dimension, dimension) or not np.isfinite(values).all():
        raise InputError(f"{name} of shape {values.shape}: expected finite numbers ({dimension}, {dimension}).")
    if not np.allclose(values, values.T, rtol=1e-5, atol=1e-7 * np.abs(values).max()):
        raise InputError(f"{name} is not symmetric: expected a covariance matrix.")
    return (values + values.T) / 2


def _check_positive(values: np.ndarray, name: str) -> None:
    # Rounding, also of statistics that were saved as float32, is far smaller than this.
    if values.min() < -1e-3 * max(np.abs(values).max(), 1e-300):
        raise InputError(f"{name} has the eigenvalue {values.min():.3g}: expected a covariance matrix, which has none.")
