"""Batches in an order that is a pure function of (seed, step)."""

from collections.abc import Iterator

import grain
import numpy as np

from mpdit_jax.data.sources import Batch, Batched

_THREADS = 2
_PREFETCH = 4  # batches


def batches(
    source: Batched, batch_size: int, seed: int, start: int = 0, rows: slice | np.ndarray = slice(None)
) -> Iterator[Batch]:
    """Endless batches from step `start` on: the batch of step s depends on (seed, s) and nothing else.

    Every epoch is a new permutation of the whole set; a batch may span two epochs.

    Args:
        source: the data.
        batch_size: global batch size.
        seed: seed of the permutations.
        start: the first step wanted; resuming costs nothing.
        rows: the rows of the global batch that this process reads.
    """
    steps = _indices(source, batch_size, seed).slice(slice(start, None)).map(lambda row: source.batch(row[rows]))
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH)))


def batch_at(source: Batched, batch_size: int, seed: int, step: int) -> Batch:
    """The whole batch of one step, for replaying it."""
    return source.batch(_indices(source, batch_size, seed)[step])


def _indices(source: Batched, batch_size: int, seed: int) -> "grain.MapDataset[np.ndarray]":
    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(batch_size)
