"""Batches on the devices, each placed there while the step before it runs."""

from collections.abc import Callable, Iterator

import jax

from mpdit_jax.data.sources import Batch
from mpdit_jax.errors import DataError

PlacedBatch = dict[str, jax.Array]


class Prefetcher:
    """One batch ahead: `prefetch` after a step was dispatched and before its result is waited for."""

    def __init__(self, batches: Iterator[Batch], place: Callable[[Batch], PlacedBatch]) -> None:
        """Nothing is read yet.

        Args:
            batches: on the host, endless.
            place: puts one on the devices.
        """
        self._batches, self._place = batches, place
        self._ready: PlacedBatch | DataError | None = None

    def prefetch(self) -> None:
        """Read and place the next batch unless that is done. What is wrong with it is told when its turn comes."""
        if self._ready is None:
            try:
                self._ready = self._place(next(self._batches))
            except DataError as error:
                self._ready = error

    def take(self) -> PlacedBatch:
        """The next batch.

        Raises:
            DataError: what reading it raised.
        """
        self.prefetch()
        ready, self._ready = self._ready, None
        if isinstance(ready, DataError):
            raise ready
        assert ready is not None
        return ready
