"""Where the time of a run goes: waiting for data, saving and drawing, and the rest, which is the device's."""

import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Literal

import jax

from mpdit_jax.runtime.hardware import GIB


class Stopwatch:
    """Splits the wall-clock time between two lines of the log, on this process; a context manager.

    The device works while the host prepares the next step. Waiting for data is time in which the host waits for it and
    the device has finished the step before; what is neither that nor saving or drawing is the device's. Where that is
    nearly all, the input pipeline keeps up.
    """

    def __init__(self, batch_size: int, flops_per_image: float = 0.0, peak_flops: float | None = None) -> None:
        """Start the first window.

        Args:
            batch_size: images a step.
            flops_per_image: of a step, by the model's definition, nothing computed twice.
            peak_flops: what all devices could do in a second; None if unknown.
        """
        self._batch_size, self._flops_per_image, self._peak_flops = batch_size, flops_per_image, peak_flops
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._start = time.perf_counter()
        self._steps = 0
        self._compiled = False
        # Somebody must be there when the device is done, while this thread waits for data.
        self._observer = ThreadPoolExecutor(1, "stopwatch")
        self._idle_since: Future[float] | None = None

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *error: object) -> None:
        self._observer.shutdown(wait=False)

    @contextmanager
    def of(self, part: Literal["data_wait", "other"]) -> Iterator[None]:
        """Count what runs inside for `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            if part == "data_wait" and self._idle_since is not None:
                start = max(start, self._idle_since.result()) if self._idle_since.done() else end
            self._spent[part] += max(end - start, 0.0)

    def step(self, result: Any) -> None:
        """A step has been dispatched that gives `result`, which the next one must not take over.

        The first compiles: it is waited for and left out.
        """
        if self._compiled:
            self._steps += 1
            self._idle_since = self._observer.submit(_when_ready, result)
            return
        jax.block_until_ready(result)
        self._compiled = True
        self._restart()

    def _restart(self) -> None:
        self._spent.clear()
        self._start, self._steps = time.perf_counter(), 0

    def lap(self) -> dict[str, float]:
        """Means over the window, and begin the next; the device must have finished the window's steps.

        `seconds_step` is their sum: `seconds_data_wait` (the device waiting for a batch), `seconds_other`
        (checkpoints, grids, evaluations and a profile's writing, as far as the step had to wait for them) and
        `seconds_device`. Rates leave `seconds_other` out. `mfu` is the model's operations (three forward passes) over
        the devices' peak; `device_memory_gib` the most that this process's fullest device has held. Unknown figures
        are missing.
        """
        seconds, steps = time.perf_counter() - self._start, self._steps
        spent = dict(self._spent)
        self._restart()
        if not steps:
            return {}
        wait, other = (spent.get(part, 0.0) / steps for part in ("data_wait", "other"))
        step = seconds / steps
        rate = self._batch_size / (step - other)
        values = {
            "images_per_second": rate,
            "seconds_step": step,
            "seconds_data_wait": wait,
            "seconds_other": other,
            "seconds_device": step - wait - other,
        }
        if self._peak_flops:
            values["mfu"] = rate * self._flops_per_image / self._peak_flops
        held = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
        if held:
            values["device_memory_gib"] = max(held) / GIB
        return values


def _when_ready(result: Any) -> float:
    with suppress(jax.errors.JaxRuntimeError):  # told to whoever needs the result
        jax.block_until_ready(result)
    return time.perf_counter()
