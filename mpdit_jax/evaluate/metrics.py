"""Distances between two sets of features: arrays in, numbers out."""

from collections.abc import Sequence

import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.moments import Moments, merge_processes
from mpdit_jax.evaluate.neighbours import precision_recall

__all__ = ["Moments", "frechet_distance", "inception_score", "kernel_distance", "merge_processes", "precision_recall"]


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Return the squared Fréchet distance of two Gaussians: |m1 - m2|² + tr C1 + tr C2 - 2 tr (C1 C2)^½.

    This is FID on Inception's pool_3 and sFID on its spatial features (Heusel et al., 2017; Nash et al., 2021). The
    trace of the root is computed from (R C2 R)^½ with R = C1^½: its eigenvalues are real even for singular
    covariances, which fewer images than features always have. Eigenvalues that rounding makes negative count as 0.

    Means are (d,), covariances (d, d), of any real dtype; all is computed in float64.

    Raises:
        InputError: shapes that do not fit, values that are not finite, or a matrix that is no covariance.
    """
    means = [_vector(mean1, "mean1"), _vector(mean2, "mean2")]
    if len(means[0]) != len(means[1]):
        raise InputError(
            f"features of length {len(means[0])} and {len(means[1])} have no distance: use one extractor for both."
        )
    covariances = [_covariance(cov1, "cov1", len(means[0])), _covariance(cov2, "cov2", len(means[0]))]
    # Scaling by a power of two is exact and keeps the covariances' product from overflowing.
    exponent = int(np.frexp(max(np.abs(covariance).max() for covariance in covariances))[1])
    covariances = [np.ldexp(covariance, -exponent) for covariance in covariances]
    difference = means[0] - means[1]
    values, vectors = np.linalg.eigh(covariances[0])
    _check_positive(np.ldexp(values, exponent), "cov1")
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T  # (d, d)
    # The product below hides directions in which the first Gaussian has no spread.
    _check_positive(np.ldexp(np.linalg.eigvalsh(covariances[1]), exponent), "cov2")
    product = root @ covariances[1] @ root
    spectrum = np.linalg.eigvalsh((product + product.T) / 2)
    trace = np.sqrt(np.clip(spectrum, 0, None)).sum()
    total = difference @ difference + np.ldexp(
        np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * trace, exponent
    )
    return float(max(total, 0.0))  # of equal Gaussians, rounding may leave -1e-12


def inception_score(probs: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Return mean and standard deviation over the splits of exp E KL(p(y|x) ‖ p(y)) (Salimans et al., 2016).

    `probs` are softmax outputs (N, classes). Splits are contiguous, so that samples sorted by class score differently.

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
    """Return KID: mean and standard deviation over random subsets of the unbiased squared MMD.

    The kernel is (x·y / d + 1)³ (Bińkowski et al., 2018). Unlike FID's, the expectation does not depend on the number
    of images. Features are real (N, d) and fake (M, d); `seed` chooses the subsets.

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
        raise InputError(f"subsets={subsets} of subset_size={subset_size}: expected 1 or more of 2 to {fewest} images.")
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
    # Rounding is far smaller, even of statistics saved as float32.
    if values.min() < -1e-3 * max(np.abs(values).max(), 1e-300):
        raise InputError(
            f"{name} has the eigenvalue {values.min():.3g}: expected a covariance matrix, without negative eigenvalues."
        )
