"""A progress bar with the count, the rate and the time left; lines instead of a bar if the output is not a terminal."""

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_LOG_EVERY = 10  # seconds


class WorkBar:
    """A progress bar as a context manager, such as `WorkBar("sampling", "images", total)`."""

    def __init__(
        self, verb: str, unit: str, total: int, done: int = 0, *, quiet: bool = False, lines: bool = False
    ) -> None:
        """Configure the bar.

        Args:
            verb: the work, such as "sampling".
            unit: what is counted, such as "images".
            total: the number of units.
            done: the number of units that an earlier process has done.
            quiet: show nothing.
            lines: print lines also on a terminal, because another bar is live; print none for work under 10 seconds.
        """
        self._verb, self._unit, self._lines = verb, unit, lines
        self._last = time.monotonic() if lines else -math.inf
        self._rate, self._left = _Rate(), TimeRemainingColumn()
        console = Console(
            file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet, force_terminal=False if lines else None
        )
        self._progress = Progress(
            TextColumn(verb),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            self._rate,
            self._left,
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,  # `advance` prints lines instead
        )
        self._task = self._progress.add_task(verb, total=total, completed=done, done=done)

    def __enter__(self) -> "WorkBar":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(message)

    def advance(self, count: int) -> None:
        """Count `count` more units. A log gets a line for the first call, for the last, and every 10 seconds."""
        self._progress.advance(self._task, count)
        task, now = self._progress.tasks[0], time.monotonic()
        if not self._progress.console.is_terminal and (
            now - self._last >= _LOG_EVERY or (task.finished and not self._lines)
        ):
            self._last = now
            counted = f"{int(task.completed)}/{int(task.total or 0)}"
            self.say(f"{self._verb} {counted} {self._unit}  {self._rate(task)}  {self._left(task)} left")


class _Rate(ProgressColumn):
    """Units per second in this process, without the first `advance`, which includes compilation."""

    def __init__(self) -> None:
        super().__init__()
        self._start: tuple[float, float] | None = None

    def render(self, task: Task) -> Text:
        """Return the rate, or "compiling" before the first `advance`."""
        if self._start is None and task.completed > task.fields["done"]:
            self._start = time.perf_counter(), task.completed
        if self._start is None or task.completed == self._start[1]:
            return Text("compiling" if self._start is None else "")
        return Text(f"{(task.completed - self._start[1]) / (time.perf_counter() - self._start[0]):.3g}/s")
