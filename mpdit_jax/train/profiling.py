"""Steps recorded by JAX's profiler, for TensorBoard's profile page."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax


class Profiler:
    """Records `steps` steps after the first `start` of a run; a context manager.

    The recording is in `folder/plugins/profile/`, where TensorBoard looks for it (`pip install xprof` shows it).
    """

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        self._folder, self._start, self._end = folder, start, start + steps
        self._recording = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        if self._recording:
            jax.profiler.stop_trace()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surround the dispatch of the step after `step`; start the recording if it is due."""
        if not self._recording and self._start <= step < self._end:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # recording every Python call would slow down what is measured
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._recording = True
        if not self._recording:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def ends_at(self, step: int) -> bool:
        """Return whether step number `step` is the last to record; call `finish` when the devices are done with it."""
        return self._recording and step >= self._end

    def finish(self) -> None:
        """Write the recording."""
        jax.profiler.stop_trace()
        self._recording = False
