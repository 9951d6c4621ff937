"""Streaming moments equal two passes in float64, however the vectors are divided."""

import numpy as np
import pytest

from mpdit_jax.errors import InputError
from mpdit_jax.evaluate import moments as module
from mpdit_jax.evaluate.moments import Moments, gather_rows, merge_processes
from tests.tiny import start_joined


def draw():
    # Far from the origin: where sums of squares minus squares of sums lose every digit.
    return 1e4 + np.random.default_rng(0).standard_normal((1003, 37)) * np.logspace(-3, 1, 37)


@pytest.fixture(scope="module")
def vectors():
    return draw()


def assert_two_pass(moments, vectors):
    centred = vectors - vectors.mean(axis=0)
    covariance = centred.T @ centred / (len(vectors) - 1)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert moments.count == len(vectors)
    np.testing.assert_allclose(moments.mean, vectors.mean(axis=0), rtol=1e-12)
    assert np.abs((moments.covariance - covariance) / scale).max() < 1e-8


@pytest.mark.parametrize("size", [1, 7, 64, 1003])
def test_batches_of_any_size_give_the_two_pass_covariance(vectors, size):
    moments = Moments.empty(37)
    for start in range(0, len(vectors), size):
        moments = moments.update(vectors[start : start + size])
    assert_two_pass(moments, vectors)


def test_parts_merge_in_any_order(vectors):
    parts = [Moments.of(part) for part in np.array_split(vectors, [3, 500, 501])]
    assert_two_pass(parts[2].merge(parts[0]).merge(parts[3].merge(parts[1])), vectors)
    assert_two_pass(Moments.empty(37).merge(Moments.of(vectors)), vectors)


def test_processes_merge_their_shares(vectors, monkeypatch):
    shares = np.array_split(vectors, [10, 400])
    parts = [Moments.of(share) for share in shares]
    monkeypatch.setattr(module.jax, "process_count", lambda: 3)
    monkeypatch.setattr(module, "_GATHERED", 3 * 8 * 37 * 5)  # five rows of each at a time, and a shorter rest

    # What each process sends, in the order of the calls; ours is the second.
    turn = iter([
        [np.array([float(part.count)]) for part in parts], [part.mean for part in parts],
        *[[part.scatter[start : start + 5] for part in parts] for start in range(0, 37, 5)],
    ])  # fmt: skip

    def allgather(sent):
        arrays = [np.ascontiguousarray(array, np.float64) for array in next(turn)]
        np.testing.assert_array_equal(sent, np.frombuffer(arrays[1].tobytes(), np.uint8))
        return np.stack([np.frombuffer(array.tobytes(), np.uint8) for array in arrays])

    monkeypatch.setattr(module.multihost_utils, "process_allgather", allgather)
    assert_two_pass(merge_processes(parts[1]), vectors)


_SHARES = """
import numpy as np
from mpdit_jax.evaluate.moments import Moments, merge_processes
from tests.evaluate.test_moments import assert_two_pass, draw

vectors = draw()
assert_two_pass(merge_processes(Moments.of(np.array_split(vectors, [400])[jax.process_index()])), vectors)
"""


@pytest.mark.slow
def test_two_real_processes_merge_their_shares():
    """The merged moments keep float64, which a 32-bit collective would lose."""
    both = start_joined(_SHARES)
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs


def test_rows_come_back_in_order():
    np.testing.assert_array_equal(gather_rows(np.array([[3.0], [1.0], [2.0]]), np.array([30, 10, 20])), [[1], [2], [3]])


@pytest.mark.parametrize(("features", "sentence"), [
    (np.zeros((0, 3)), "expected (images, features)"),
    (np.array([[1.0, 2.0], [np.nan, 1.0]]), "row 1 of these 2 features holds NaN"),
])  # fmt: skip
def test_bad_features_are_named(features, sentence):
    with pytest.raises(InputError) as caught:
        Moments.of(features)
    assert sentence in str(caught.value)
    with pytest.raises(InputError, match="expected 2 or more"):
        _ = Moments.of(np.ones((1, 2))).covariance
