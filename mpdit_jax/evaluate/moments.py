"""Streaming mean and covariance of features in float64, merged over batches and processes."""

import dataclasses

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpdit_jax.errors import InputError

_GATHERED = 32 << 20  # bytes that every device receives at a time


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and scatter of `count` vectors, both float64.

    Moments merge by the pairwise update of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for
    computing sample variances", 1979), which takes no difference of large sums.
    """

    count: int
    mean: np.ndarray  # (d,)
    scatter: np.ndarray  # (d, d), sum of outer products of deviations from the mean

    @classmethod
    def empty(cls, dimension: int) -> "Moments":
        """Return the moments of no vectors."""
        return cls(0, np.zeros(dimension), np.zeros((dimension, dimension)))

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Compute the moments of one batch (n, d); raises InputError unless it is a matrix of finite numbers."""
        values = np.asarray(features)
        if values.ndim != 2 or not len(values):
            raise InputError(f"features of shape {values.shape}: expected (images, features), one image or more.")
        values = values.astype(np.float64)
        mean = values.mean(axis=0)
        if not np.isfinite(mean).all():
            bad = int(np.argmin(np.isfinite(values).all(axis=1)))
            raise InputError(f"row {bad} of these {len(values)} features holds NaN or Inf: leave that image out.")
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance (d, d), as by numpy.cov; raises InputError for fewer than two vectors."""
        if self.count < 2:
            raise InputError(f"a covariance of {self.count} image(s): expected 2 or more.")
        return self.scatter / (self.count - 1)

    def update(self, features: np.ndarray) -> "Moments":
        """Return these moments merged with another batch (n, d)."""
        return self.merge(Moments.of(features))

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of vectors; raises InputError if their lengths differ."""
        if self.mean.shape != other.mean.shape:
            raise InputError(f"features of length {len(self.mean)} and {len(other.mean)} do not merge.")
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(step, step * (self.count * other.count / count))
        return Moments(count, self.mean + step * (other.count / count), scatter)


def merge_processes(moments: Moments) -> Moments:
    """Merge the moments of all processes; every process gets the same bits. Collective."""
    if jax.process_count() == 1:
        return moments
    dimension = len(moments.mean)
    rows = max(1, _GATHERED // (8 * dimension * jax.process_count()))
    counts = gather(np.array([float(moments.count)]))[:, 0].astype(int)
    means = gather(moments.mean)
    parts = [
        Moments(int(count), mean, np.zeros((dimension, dimension))) for count, mean in zip(counts, means, strict=True)
    ]
    merged = Moments.empty(dimension)
    for part in parts:
        merged = merged.merge(part)
    # Gather a few rows of every scatter at a time: all at once would be gigabytes on a large pod.
    scatter = merged.scatter.copy()
    for start in range(0, dimension, rows):
        scatter[start : start + rows] += gather(moments.scatter[start : start + rows]).sum(axis=0)
    return dataclasses.replace(merged, scatter=scatter)


def gather_rows(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Gather all processes' rows (n, d) float32, sorted by their numbers `order` (n,). Collective."""
    if jax.process_count() == 1:
        return rows[np.argsort(order)]
    most = int(gather(np.array([float(len(rows))])).max())
    padded = np.zeros((most, rows.shape[1]), np.float32)
    padded[: len(rows)] = rows
    numbers = np.full(most, np.inf)
    numbers[: len(rows)] = order
    everything = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, rows.shape[1])
    ranks = gather(numbers).ravel()
    places = np.argsort(ranks, kind="stable")
    return everything[places[: np.isfinite(ranks).sum()]]


def gather(array: np.ndarray) -> np.ndarray:
    """Stack all processes' float64 arrays, sent as bytes since JAX would make them float32. Collective."""
    local = np.ascontiguousarray(array, np.float64)
    if jax.process_count() == 1:
        return local[None]
    found = np.asarray(multihost_utils.process_allgather(np.frombuffer(local.tobytes(), np.uint8)))
    return np.frombuffer(found.tobytes(), np.float64).reshape(-1, *local.shape)
