"""A window of steps recorded by JAX's profiler, for TensorBoard's profile page."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax


class Profiler:
    """Records `steps` steps from step `start` on (the first step of a run is 0); a context manager.

    The recording lies in `folder/plugins/profile/`, where TensorBoard looks for it (`pip install xprof` shows it).
    """

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        self._folder, self._start, self._end = folder, start, start + steps
        self._recording = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._recording:
            jax.profiler.stop_trace()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the dispatch of step `step`."""
        if not self._recording and self._start <= step < self._end:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would be recorded, and slow down what is measured
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._recording = True
        if self._recording:
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield
        else:
            yield

    def ends_with(self, step: int) -> bool:
        """Whether `step`, which has been dispatched, is the last to record: `finish` when the device is done."""
        return self._recording and step + 1 >= self._end

    def finish(self) -> None:
        """Write the recording."""
        jax.profiler.stop_trace()
        self._recording = False
