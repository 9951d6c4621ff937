"""Where the time of a run goes: waiting for data, other work of the host, and the devices' work."""

import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Literal

import jax

from mpdit_jax.runtime.hardware import GIB


class Stopwatch:
    """Splits this process's wall-clock time between two lines of the log; a context manager.

    The devices work while the host prepares the next step. Data wait is the time in which the host waits for data while
    the devices are idle. Time that is neither data wait nor other work (saving, drawing, evaluating) is device time. If
    nearly all is device time, the input pipeline keeps up.

    Args:
        batch_size: images a step.
        flops_per_image: of a step, by the model's definition, without recomputation.
        peak_flops: of all devices, a second; None if unknown.
    """

    def __init__(self, batch_size: int, flops_per_image: float = 0.0, peak_flops: float | None = None) -> None:
        self._batch_size, self._flops_per_image, self._peak_flops = batch_size, flops_per_image, peak_flops
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._start, self._steps, self._compiled = time.perf_counter(), 0, False
        # A thread notes when the devices are done, as the main thread may be waiting for data.
        self._observer = ThreadPoolExecutor(1, "stopwatch")
        self._idle_since: Future[float] | None = None

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *error: object) -> None:
        self._observer.shutdown(wait=False)

    @contextmanager
    def of(self, part: Literal["data_wait", "other"]) -> Iterator[None]:
        """Add the time of the enclosed block to `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            if part == "data_wait" and self._idle_since is not None:
                start = max(start, self._idle_since.result()) if self._idle_since.done() else end
            self._spent[part] += max(end - start, 0.0)

    def step(self, result: Any) -> None:
        """Count a dispatched step by its `result`, whose buffer must not be donated to the next step.

        The first step compiles: it is waited for and left out.
        """
        if self._compiled:
            self._steps += 1
            self._idle_since = self._observer.submit(_when_ready, result)
        else:
            jax.block_until_ready(result)
            self._compiled = True
            self._restart()

    def lap(self) -> dict[str, float]:
        """End a window, whose steps the devices must have finished, and begin the next; means over its steps.

        `seconds_step` is the sum of `seconds_data_wait` (the devices wait for a batch), `seconds_other` (checkpoints,
        grids, evaluations and a profile's writing, as far as a step had to wait for them) and `seconds_device`. Rates
        leave `seconds_other` out. `mfu` is the model's operations (three forward passes) over the devices' peak;
        `device_memory_gib` the most that this process's fullest device has held. Unknown values are missing.
        """
        seconds, steps, spent = time.perf_counter() - self._start, self._steps, dict(self._spent)
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

    def _restart(self) -> None:
        self._spent.clear()
        self._start, self._steps = time.perf_counter(), 0


def _when_ready(result: Any) -> float:
    with suppress(jax.errors.JaxRuntimeError):  # raised again where the result is used
        jax.block_until_ready(result)
    return time.perf_counter()
