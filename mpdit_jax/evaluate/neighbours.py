"""Improved precision and recall, exact, computed in blocks.

Whether an image lies in another's ball is decided by float32 distances with a bound on their error; what falls within
the bound is decided again in float64. The result is therefore that of float64 brute force, at float32's speed.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import InputError

_BLOCK = 2048  # rows and columns of distances at a time, at most: 16 MiB
_SMALLEST_BLOCK = 256
_SPARE = 5  # neighbours kept beyond k, for float64 to choose from
_EXACT = 64  # rows settled in float64 at a time
_RANGE = 40  # binary exponents of features, whose squares and their sums float32 holds
_EPSILON, _TINY = float(np.finfo(np.float32).eps), float(np.finfo(np.float32).tiny)


class _Set(NamedTuple):
    """Features about a common centre, padded to whole blocks."""

    exact: np.ndarray  # float64 (n, d), as given
    centred: np.ndarray  # float32 (blocks, block, d)
    norms: np.ndarray  # float32 (blocks, block), squared
    valid: np.ndarray  # bool (blocks, block); False for what only fills up the last block


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Share of fakes within the real images' manifold, and of those within the fakes' (Kynkäänniemi et al., 2019).

    A manifold is the union of balls around its images, each reaching to the image's k-th nearest neighbour in its own
    set, its border included. With 50,000 images of 2,048 features in each set the process needs 2.3 GiB, the
    features' 0.8 included (`studies.beside_torch evaluate --neighbours=50000`).

    Args:
        real: features (N, d), any real dtype.
        fake: features (M, d).
        k: the neighbour that decides the radius; the published value is 3.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        InputError: other shapes, values that are not finite, or fewer than k + 1 images in a set.
    """
    real, fake = np.asarray(real), np.asarray(fake)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise InputError(f"features {real.shape} and {fake.shape}: expected (N, d) and (M, d).")
    if k < 1:
        raise InputError(f"k={k}: expected 1 or more.")
    for name, features in (("real", real), ("fake", fake)):
        if len(features) < k + 1:
            raise InputError(
                f"precision and recall with k={k} need {k + 1} images or more in each set: there are {len(features)} "
                f"{name} ones."
            )
        if not np.isfinite(features).all():
            raise InputError(f"the {name} features hold NaN or Inf: leave those images out.")
    real, fake = _within_float32(real, fake)
    block = _SMALLEST_BLOCK
    while block < min(_BLOCK, max(len(real), len(fake))):
        block *= 2
    real_radii, fake_radii = _radii(real, k, block), _radii(fake, k, block)
    centre = real.mean(axis=0, dtype=np.float64)
    reals, fakes = _prepare(real, centre, block), _prepare(fake, centre, block)
    fakes_covered, reals_covered = _cover(reals, real_radii, fakes, fake_radii)
    return float(fakes_covered.mean()), float(reals_covered.mean())


def _within_float32(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets scaled by one power of two, where squares of the features would leave float32's range.

    Exact, but for squares of differences 300 orders of magnitude below the largest.
    """
    largest = max(float(np.abs(real).max(initial=0)), float(np.abs(fake).max(initial=0)))
    if not largest or 2.0**-_RANGE <= largest <= 2.0**_RANGE:
        return real, fake
    exponent = -int(np.frexp(largest)[1])
    return np.ldexp(real.astype(np.float64), exponent), np.ldexp(fake.astype(np.float64), exponent)


def _prepare(features: np.ndarray, centre: np.ndarray, block: int) -> _Set:
    count, dimension = features.shape
    blocks = -(-count // block)
    centred = np.zeros((blocks * block, dimension), np.float32)
    for start in range(0, count, block):
        part = features[start : start + block]
        centred[start : start + len(part)] = part - centre
    norms = np.einsum("nd,nd->n", centred, centred)
    valid = np.arange(blocks * block) < count
    return _Set(features, *(array.reshape(blocks, block, *array.shape[1:]) for array in (centred, norms, valid)))


def _radii(features: np.ndarray, k: int, block: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest neighbour in the set, float64 (n,)."""
    # Centred on the set's own mean: far from another centre, float32 cannot resolve a narrow set.
    points = _prepare(features, features.mean(axis=0, dtype=np.float64), block)
    count, keep = len(features), min(k + _SPARE, len(features) - 1)
    radii = np.empty(count)
    columns = jax.device_put((points.centred, points.norms, points.valid))
    for number, norms in enumerate(points.norms):
        start = number * len(norms)
        lower, found = _nearest(points.centred[number], norms, start, columns, keep)
        rows = np.arange(start, min(start + len(norms), count))
        bounds, candidates = np.asarray(lower)[: len(rows), -1], np.asarray(found)[: len(rows)]
        radii[rows], settled = _choose(features, rows, candidates, bounds, k)
        if not settled.all():
            radii[rows[~settled]] = _radii_exactly(features, rows[~settled], k, keep)
    return radii


def _choose(
    features: np.ndarray, rows: np.ndarray, candidates: np.ndarray, bounds: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k-th smallest squared distance of rows (m,) to their candidates (m, keep), and whether it is that to all.

    Nothing that is no candidate is nearer than its row's bound (m,).
    """
    kth = np.empty(len(rows))
    for part in np.array_split(np.arange(len(rows)), -(-len(rows) // _EXACT)):
        exact = _between(features[rows[part], None], features[candidates[part]])  # (part, keep)
        kth[part] = np.partition(exact, k - 1, axis=1)[:, k - 1]
    return kth, (kth <= bounds) | (kth == 0) | (candidates.shape[1] == len(features) - 1)


def _radii_exactly(features: np.ndarray, rows: np.ndarray, k: int, keep: int) -> np.ndarray:
    """Radii of a few rows (m,) from float64 products, or from differences where products are too coarse."""
    origin = features[rows].mean(axis=0, dtype=np.float64)
    near = features[rows] - origin
    lower, found = np.full((len(rows), keep), np.inf), np.zeros((len(rows), keep), int)
    for start, chunk in zip(range(0, len(features), _BLOCK), _chunks(features), strict=True):
        far = chunk - origin
        sums = (near**2).sum(axis=1)[:, None] + (far**2).sum(axis=1)[None, :]
        here = np.arange(start, start + len(chunk))
        bound = sums - 2 * near @ far.T - sums * (np.finfo(np.float64).eps * (features.shape[1] + 8))
        bound[rows[:, None] == here[None, :]] = np.inf
        lower = np.concatenate([lower, bound], axis=1)  # (m, keep + chunk)
        found = np.concatenate([found, np.broadcast_to(here, bound.shape)], axis=1)
        best = np.argpartition(lower, keep - 1, axis=1)[:, :keep]
        lower, found = (np.take_along_axis(array, best, axis=1) for array in (lower, found))
    radii, settled = _choose(features, rows, found, lower.max(axis=1), k)
    for index in np.flatnonzero(~settled):
        others = np.concatenate([_between(features[rows[index]], chunk) for chunk in _chunks(features)])
        others[rows[index]] = np.inf
        radii[index] = np.partition(others, k - 1)[k - 1]
    return radii


@partial(jax.jit, static_argnames="keep")
def _nearest(
    rows: jax.Array, norms: jax.Array, start: int, columns: tuple[jax.Array, jax.Array, jax.Array], keep: int
) -> tuple[jax.Array, jax.Array]:
    """For each row of a block the `keep` columns with the smallest lower bounds of squared distance, ascending."""
    block = len(rows)
    here = jnp.arange(block)

    def step(best: tuple[jax.Array, jax.Array], column: tuple[jax.Array, ...]) -> tuple[Any, None]:
        number, centred, column_norms, valid = column
        squares, error = _squares(rows, norms, centred, column_norms)
        use = valid[None, :] & (number * block + here[None, :] != start + here[:, None])
        lower = jnp.concatenate([best[0], jnp.where(use, squares - error, jnp.inf)], axis=1)  # (rows, keep + columns)
        values, chosen = jax.lax.top_k(-lower, keep)
        before = jnp.take_along_axis(best[1], jnp.minimum(chosen, keep - 1), axis=1)
        return (-values, jnp.where(chosen < keep, before, number * block + chosen - keep)), None

    initial = jnp.full((block, keep), jnp.inf), jnp.zeros((block, keep), jnp.int32)
    best, _ = jax.lax.scan(step, initial, (jnp.arange(len(columns[0])), *columns))
    return best


def _cover(real: _Set, real_radii: np.ndarray, fake: _Set, fake_radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which fakes lie in a ball around a real image, and which real images in one around a fake; radii are squared."""
    balls = jax.device_put((fake.centred, fake.norms, fake.valid, _filled(fake_radii, fake.valid)))
    reach = _filled(real_radii, real.valid)
    real_found, fake_found = np.zeros((2, real.valid.size), bool), np.zeros((2, fake.valid.size), bool)
    block = reach.shape[1]
    for number in range(len(reach)):
        rows, columns = _inside(real.centred[number], real.norms[number], real.valid[number], reach[number], balls)
        real_found[:, number * block : (number + 1) * block] = rows
        fake_found |= np.asarray(columns).swapaxes(0, 1).reshape(2, -1)
    covered = []
    for (surely, perhaps), points, centres, radii in (
        (fake_found, fake.exact, real.exact, real_radii),
        (real_found, real.exact, fake.exact, fake_radii),
    ):
        rest = np.flatnonzero((perhaps & ~surely)[: len(points)])
        for part in np.array_split(rest, max(1, -(-len(rest) // _EXACT))):
            if len(part):
                surely[part] = _inside_exactly(points[part], centres, radii)
        covered.append(surely[: len(points)])
    return covered[0], covered[1]


def _filled(radii: np.ndarray, valid: np.ndarray) -> np.ndarray:
    filled = np.zeros(valid.size, np.float32)
    filled[: len(radii)] = radii
    return filled.reshape(valid.shape)


@jax.jit
def _inside(
    rows: jax.Array, norms: jax.Array, row_valid: jax.Array, row_radii: jax.Array, columns: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """Does a point of a block lie in a ball around one of the columns, beyond doubt and perhaps: (2, rows); and do
    they in balls around the rows: (blocks, 2, columns).
    """

    def step(found: jax.Array, column: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        centred, column_norms, valid, radii = column
        squares, error = _squares(rows, norms, centred, column_norms)
        use = row_valid[:, None] & valid[None, :]
        in_columns, in_rows = radii[None, :] - squares, row_radii[:, None] - squares
        column_error, row_error = error + _EPSILON * radii[None, :], error + _EPSILON * row_radii[:, None]
        found |= jnp.stack([(use & (in_columns > column_error)).any(1), (use & (in_columns >= -column_error)).any(1)])
        others = jnp.stack([(use & (in_rows > row_error)).any(0), (use & (in_rows >= -row_error)).any(0)])
        return found, others

    return jax.lax.scan(step, jnp.zeros((2, len(rows)), bool), columns)


def _squares(
    rows: jax.Array, row_norms: jax.Array, columns: jax.Array, column_norms: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Squared distances of two blocks (rows, columns) in float32, and a bound on their error.

    A sum of d products is off by at most d half-epsilons of the norms' product (Higham, "Accuracy and Stability of
    Numerical Algorithms", section 3.1): so is each norm of itself, and 2 |a| |b| is at most |a|² + |b|². Each product
    may also vanish that is smaller than any float32.
    """
    sums = row_norms[:, None] + column_norms[None, :]
    product = jax.lax.dot_general(rows, columns, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return sums - 2 * product, sums * (_EPSILON * (rows.shape[1] + 8)) + 4 * _TINY * rows.shape[1]


def _inside_exactly(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Whether each of a few points lies in a ball, by float64 distances."""
    inside = np.zeros(len(points), bool)
    points = points.astype(np.float64)
    origin = points.mean(axis=0)
    near = points - origin
    for start, chunk in zip(range(0, len(centres), _BLOCK), _chunks(centres), strict=True):
        far, reach = chunk.astype(np.float64) - origin, radii[start : start + len(chunk)]
        sums = (near**2).sum(axis=1)[:, None] + (far**2).sum(axis=1)[None, :]
        room = reach[None, :] - (sums - 2 * near @ far.T)
        close = np.abs(room) <= 1e-9 * (sums + reach)
        inside |= ((room >= 0) & ~close).any(axis=1)
        for row, column in np.argwhere(close & ~inside[:, None]):
            inside[row] |= _between(points[row], chunk[column]) <= reach[column]
    return inside


def _between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances along the last axis in float64, from the differences: exact zeros for equal vectors."""
    squares: np.ndarray = np.square(np.ascontiguousarray(a, np.float64) - b).sum(axis=-1)
    return squares


def _chunks(features: np.ndarray) -> Iterator[np.ndarray]:
    return (features[start : start + _BLOCK] for start in range(0, len(features), _BLOCK))
