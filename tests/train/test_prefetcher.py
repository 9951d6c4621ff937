"""Batches are placed one ahead, and a batch that cannot be read raises when it is taken."""

import pytest

from mpdit_jax.errors import DataError
from mpdit_jax.train.prefetcher import Prefetcher


def numbers(broken_at):
    for number in range(100):
        if number == broken_at:
            raise DataError(f"{number} is broken")
        yield {"x": number}


def test_a_batch_is_placed_before_it_is_taken_and_once():
    placed = []
    prefetcher = Prefetcher(numbers(None), lambda batch: placed.append(batch["x"]) or batch)
    assert placed == []
    assert prefetcher.take() == {"x": 0}
    prefetcher.prefetch()
    prefetcher.prefetch()
    assert placed == [0, 1]
    assert [prefetcher.take()["x"] for _ in range(3)] == [1, 2, 3]
    assert placed == [0, 1, 2, 3]


def test_what_is_wrong_with_a_batch_is_told_when_its_turn_comes():
    prefetcher = Prefetcher(numbers(2), lambda batch: batch)
    assert prefetcher.take()["x"] == 0
    prefetcher.prefetch()
    assert prefetcher.take()["x"] == 1
    prefetcher.prefetch()
    with pytest.raises(DataError, match="2 is broken"):
        prefetcher.take()
