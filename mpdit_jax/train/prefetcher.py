"""Batches on the devices, each placed there while the devices work on the step before."""

from collections.abc import Callable, Iterator

import jax

from mpdit_jax.data.sources import Batch
from mpdit_jax.errors import DataError

PlacedBatch = dict[str, jax.Array]


class Prefetcher:
    """Keeps one batch ready on the devices: call `prefetch` after dispatching a step, before waiting for its result.

    Args:
        batches: on the host, endless.
        place: puts a batch on the devices.
    """

    def __init__(self, batches: Iterator[Batch], place: Callable[[Batch], PlacedBatch]) -> None:
        self._batches, self._place = batches, place
        self._ready: PlacedBatch | DataError | None = None

    def prefetch(self) -> None:
        """Read and place the next batch, once; `take` raises its DataError."""
        if self._ready is None:
            try:
                self._ready = self._place(next(self._batches))
            except DataError as error:
                self._ready = error

    def take(self) -> PlacedBatch:
        """Return the next batch. Raise DataError if it cannot be read."""
        self.prefetch()
        ready, self._ready = self._ready, None
        if isinstance(ready, DataError):
            raise ready
        assert ready is not None
        return ready
