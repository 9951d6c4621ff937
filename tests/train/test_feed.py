"""The batch that is placed ahead."""

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
    feed = Prefetcher(numbers(None), lambda batch: placed.append(batch["x"]) or batch)
    assert placed == []
    assert feed.take() == {"x": 0}
    feed.prefetch()
    feed.prefetch()
    assert placed == [0, 1]
    assert [feed.take()["x"] for _ in range(3)] == [1, 2, 3]
    assert placed == [0, 1, 2, 3]


def test_what_is_wrong_with_a_batch_is_told_when_its_turn_comes():
    feed = Prefetcher(numbers(2), lambda batch: batch)
    assert feed.take()["x"] == 0
    feed.prefetch()
    assert feed.take()["x"] == 1
    feed.prefetch()
    with pytest.raises(DataError, match="2 is broken"):
        feed.take()
