"""Precision and recall equal brute force in float64, to the last image."""

import numpy as np
import pytest

from mpdit_jax.errors import InputError
from mpdit_jax.evaluate import neighbours
from mpdit_jax.evaluate.neighbours import precision_recall


def brute_force(real, fake, k):
    """Return precision and recall from all differences, in float64."""
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    between = lambda a, b: np.stack([np.square(row - b).sum(axis=1) for row in a])  # noqa: E731
    reach = [np.sort(between(x, x), axis=1)[:, k] for x in (real, fake)]
    across = between(real, fake)
    return (across <= reach[0][:, None]).any(axis=0).mean(), (across <= reach[1][None, :]).any(axis=1).mean()


def sets(n, m, dimension, *, scale=1.1, offset=0.0, seed=0):
    random = np.random.default_rng(seed)
    real, fake = random.standard_normal((n, dimension)), scale * random.standard_normal((m, dimension))
    return (real + offset).astype(np.float32), (fake + offset).astype(np.float32)


@pytest.mark.parametrize(("arguments", "options", "k"), [
    ((300, 500, 8), {}, 3),
    ((600, 130, 64), {"offset": 1000.0}, 5),  # far from the origin, where |a|² - 2ab + |b|² cancels
    ((257, 256, 512), {"scale": 1.0}, 1),  # blocks that are not full; neighbours that are nearly equally far
])  # fmt: skip
def test_equal_to_brute_force(arguments, options, k):
    real, fake = sets(*arguments, **options)
    found = precision_recall(real, fake, k)
    assert found == brute_force(real, fake, k)
    assert min(found) > 0
    assert max(found) < 1


def test_what_float32_cannot_tell_apart_is_settled_in_float64(monkeypatch):
    settled = []
    exactly = neighbours._inside_exactly
    monkeypatch.setattr(neighbours, "_inside_exactly", lambda *a: settled.append(len(a[0])) or exactly(*a))
    # On a line, one apart: every ball of the nearest neighbour reaches exactly to the next, and borders belong to it.
    real = np.arange(10.0)[:, None]
    fake = np.array([[10.0], [10 + 1e-9], [-1.0], [-1 - 1e-9], [20.0], [30.0]])
    assert precision_recall(real, fake, 1)[0] == 2 / 6
    assert settled[0] == 4
    # In many dimensions, points in pairs a millionth apart: every distance has near equals.
    real, fake = sets(150, 150, 16)
    random = np.random.default_rng(1)
    near = lambda x: np.concatenate([x, x + 1e-6 * random.standard_normal(x.shape)])  # noqa: E731
    real, fake = near(real.astype(np.float64)), near(fake.astype(np.float64))
    assert precision_recall(real, fake) == brute_force(real, fake, 3)


@pytest.mark.parametrize("centres", [[5.0], [5.0, -5.0]], ids=["one", "two"])
def test_narrow_sets_far_apart_are_decided_quickly(monkeypatch, centres):
    """A collapsed model gives such sets: float32 cannot tell the members of two distant clusters apart."""
    random, calls, between = np.random.default_rng(0), [], neighbours._between
    monkeypatch.setattr(neighbours, "_between", lambda *a: calls.append(1) or between(*a))
    real = random.standard_normal((300, 64)).astype(np.float32)
    fake = np.resize(centres, 300)[:, None] + 1e-3 * random.standard_normal((300, 64))
    fake = np.concatenate([fake[:200], real[:100]]).astype(np.float32)
    found = precision_recall(real, fake)
    assert len(calls) < 100
    assert found == brute_force(real, fake, 3)
    assert found[0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e25])
def test_features_whose_squares_float32_does_not_hold(size):
    """Neither set lies within the other, so a wrong answer would be 0 or 1."""
    real, fake = sets(200, 150, 8)
    expected = precision_recall(real, fake)
    assert 0 < min(expected) < max(expected) < 1
    real, fake = real * np.float32(size), fake * np.float32(size)
    assert precision_recall(real, fake) == brute_force(real, fake, 3) == pytest.approx(expected, abs=0.02)


def test_a_set_so_small_beside_the_other_that_its_squares_vanish():
    real, fake = sets(200, 150, 512)
    real[:100] *= np.float32(1e-20)
    fake *= np.float32(1e-20)
    assert precision_recall(real, fake) == brute_force(real, fake, 3)


def test_copies_lie_within_even_balls_of_no_size():
    real, _ = sets(64, 64, 4)
    many = np.repeat(real[:8], 6, axis=0)  # each five times over: the third neighbour is at distance 0
    assert precision_recall(many, many) == (1.0, 1.0)
    assert precision_recall(many, real[:8]) == (1.0, brute_force(many, real[:8], 3)[1])
    assert precision_recall(real, real) == (1.0, 1.0)


@pytest.mark.parametrize(("real", "fake", "k", "sentence"), [
    (np.zeros((3, 2)), np.zeros((9, 2)), 3, "need 4 images or more in each set: there are 3 real ones"),
    (np.zeros((9, 2)), np.zeros((2, 2)), 2, "there are 2 fake ones"),
    (np.zeros((9, 2)), np.zeros((9, 3)), 3, "expected (N, d) and (M, d)"),
    (np.zeros((9, 2)), np.full((9, 2), np.inf), 3, "fake features hold NaN or Inf"),
    (np.zeros((9, 2)), np.zeros((9, 2)), 0, "k=0"),
])  # fmt: skip
def test_bad_input_is_one_sentence(real, fake, k, sentence):
    with pytest.raises(InputError) as caught:
        precision_recall(real, fake, k)
    assert sentence in str(caught.value)


@pytest.mark.parity
def test_equal_to_prdc():
    prdc = pytest.importorskip("prdc")
    real, fake = sets(400, 300, 32)
    theirs = prdc.compute_prdc(real.astype(np.float64), fake.astype(np.float64), nearest_k=3)
    assert precision_recall(real, fake) == (theirs["precision"], theirs["recall"])
