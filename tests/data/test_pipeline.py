import numpy as np
import pytest

from mpdit_jax.data.pipeline import batch_at, batches
from mpdit_jax.data.sources import array_source, load_digits


@pytest.fixture(scope="module")
def numbered():
    """50 one-pixel images whose value is their index."""
    images = np.arange(50, dtype=np.float32).reshape(50, 1, 1, 1)
    return array_source(images, np.arange(50) % 10, tuple("0123456789"))


def order(source, batch_size, seed, start, count):
    stream = batches(source, batch_size, seed, start)
    return np.stack([next(stream)["x"].ravel() for _ in range(count)])


def test_batch_is_a_function_of_seed_and_step(numbered):
    whole = order(numbered, 8, 3, 0, 20)
    for start in (1, 7, 19):
        assert np.array_equal(order(numbered, 8, 3, start, 20 - start), whole[start:])
        assert np.array_equal(batch_at(numbered, 8, 3, start)["x"].ravel(), whole[start])
    assert np.array_equal(order(numbered, 8, 3, 0, 20), whole)
    assert not np.array_equal(order(numbered, 8, 4, 0, 20), whole)


def test_every_epoch_is_a_new_permutation(numbered):
    stream = order(numbered, 8, 0, 0, 25).reshape(4, 50)  # 200 examples: 4 epochs
    for epoch in stream:
        assert np.array_equal(np.sort(epoch), np.arange(50))
    assert not np.array_equal(stream[0], stream[1])


def test_rows_of_processes_make_the_global_batch(numbered):
    whole = next(batches(numbered, 8, 0, start=5))
    parts = [next(batches(numbered, 8, 0, start=5, rows=slice(first, first + 4))) for first in (0, 4)]
    for key in ("x", "y"):
        assert np.array_equal(np.concatenate([part[key] for part in parts]), whole[key])


def test_labels_stay_with_their_images():
    digits = load_digits()
    batch, whole = batch_at(digits, 64, 0, 11), digits.batch(np.arange(len(digits)))["x"]
    for image, label in zip(batch["x"], batch["y"], strict=True):
        assert label in digits.labels[(whole == image).all(axis=(1, 2, 3))]
