"""Statistics of images that the processes of a run look at in shares."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mpdit_jax.distributed.collectives import any_process
from mpdit_jax.evaluate.compute import kept, needed
from mpdit_jax.evaluate.extractors import Extractor
from mpdit_jax.evaluate.moments import Moments, gather_rows, merge_processes
from mpdit_jax.evaluate.statistics import Statistics, from_moments
from mpdit_jax.runtime.progress import WorkBar


def partial_statistics(
    total: int, width: int, verb: str, unit: str, stopped: Callable[[], bool]
) -> Iterator[np.ndarray | None]:
    """The rows of every turn that are this process's, at most `width` and maybe none, with progress in the log.

    Ends with None, on all processes at the same turn, where one of them was asked to stop.
    """
    count, index = jax.process_count(), jax.process_index()
    with WorkBar(verb, unit, total, quiet=index > 0, lines=True) as bar:
        for start in range(0, total, width * count):
            if any_process(stopped()):
                yield None
                return
            yield np.arange(start + index * width, min(start + (index + 1) * width, total))
            bar.advance(min(width * count, total - start))


class PartialStatistics:
    """What this process has seen of a set, until all of it is put together."""

    def __init__(self, extractor: Extractor, metrics: Sequence[str]) -> None:
        """Nothing has been seen yet.

        Args:
            extractor: what looks at images.
            metrics: what they are for.
        """
        self._extractor = extractor
        outputs, keep = needed(metrics), kept(metrics)
        self._moments: dict[str, Moments] = {
            name: Moments.empty(extractor.outputs[name]) for name in ("pool", "spatial") if name in outputs
        }
        self._kept: dict[str, list[np.ndarray]] = {
            name: [np.zeros((0, extractor.outputs[name]), np.float32)] for name in keep
        }
        self._numbers = [np.zeros(0, int)]
        self.count = 0  # of the whole set, once it is put together

    def add(self, images: np.ndarray, numbers: np.ndarray) -> None:
        """Look at images uint8 (n, H, W, C), which have these numbers in the set."""
        features = self._extractor(images, numbers)
        for name, seen in self._moments.items():
            self._moments[name] = seen.update(features[name])
        for name, arrays in self._kept.items():
            arrays.append(features[name])
        self._numbers.append(numbers)

    def together(self, about: dict[str, Any]) -> Statistics | None:
        """The statistics of the whole set, on every process, which must all call it; None of fewer than two images."""
        moments = {name: merge_processes(seen) for name, seen in self._moments.items()}
        self.count = moments["pool"].count
        if self.count < 2:
            return None
        order = np.concatenate(self._numbers)
        whole = {name: gather_rows(np.concatenate(arrays), order) for name, arrays in self._kept.items()}
        about = {**about, "count": self.count}
        return from_moments(self._extractor, moments, whole.get("pool"), whole.get("probs"), about)
