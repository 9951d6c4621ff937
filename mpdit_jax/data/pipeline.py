"""The input pipeline: batches in an order that is a pure function of (seed, step)."""

from collections.abc import Iterator
from functools import lru_cache

import grain
import numpy as np

from mpdit_jax.data.sources import Batch, Batched

_PREFETCH = 4  # batches


def batches(
    source: Batched,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: slice | np.ndarray = slice(None),
    threads: int = 1,
) -> Iterator[Batch]:
    """Yield endless batches from step `start` on; the batch of step s depends on (seed, s) and nothing else.

    Every epoch is a new permutation of the whole set; a batch may span two epochs.

    Args:
        source: the data.
        batch_size: global batch size.
        seed: seed of the permutations.
        start: the first step wanted; resuming costs nothing.
        rows: the rows of the global batch that this process reads.
        threads: number of reading threads, on which no batch depends. They contend for Python's global lock.
    """
    order = Order(len(source), seed)
    steps = grain.MapDataset.range(start, 2**62).map(lambda step: source.batch(order.batch(step, batch_size)[rows]))
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_PREFETCH)))


def batch_at(source: Batched, batch_size: int, seed: int, step: int) -> Batch:
    """Return the whole batch of one step, for a replay."""
    return source.batch(Order(len(source), seed).batch(step, batch_size))


class Order:
    """Endless shuffled epochs over `count` examples; each is permuted at once, which is faster than index by index."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        # Near an epoch's end, threads need the permutations of two epochs.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: _permutation(count, seed, epoch))

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        """Indices (batch_size,) of the examples of a step."""
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs = positions // self.count
        parts = [self._epoch(int(epoch))[positions[epochs == epoch] % self.count] for epoch in np.unique(epochs)]
        return np.concatenate(parts)


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
