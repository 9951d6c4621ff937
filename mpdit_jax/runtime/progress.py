"""A bar for work that is counted: so many of so many, the rate, the time left; lines where the output is a log."""

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_LOG_EVERY = 10  # seconds


class WorkBar:
    """A context manager around counted work, such as `WorkBar("sampling", "images", total, done)`."""

    def __init__(
        self, verb: str, unit: str, total: int, done: int = 0, *, quiet: bool = False, lines: bool = False
    ) -> None:
        """Nothing is shown yet.

        Args:
            verb: what is done.
            unit: of what.
            total: how many of them.
            done: how many of these before.
            quiet: show nothing.
            lines: no bar, where another bar is live: lines, and none for what takes less than 10 seconds.
        """
        self._verb, self._unit, self._brief = verb, unit, lines
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
            disable=not console.is_terminal,  # a log gets the lines of `advance` instead
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
        """So many more are done. A log gets a line for the first, for the last, and at most one in 10 seconds."""
        self._progress.advance(self._task, count)
        task, now = self._progress.tasks[0], time.monotonic()
        if not self._progress.console.is_terminal and (
            now - self._last >= _LOG_EVERY or (task.finished and not self._brief)
        ):
            self._last = now
            rate, left = str(self._rate(task)), str(self._left(task))
            counted = f"{int(task.completed)}/{int(task.total or 0)}"
            self.say(f"{self._verb} {counted} {self._unit}  {rate}  {left} left")


class _Rate(ProgressColumn):
    """Units a second since this process began, the first ones (which wait for a compilation) left out."""

    def __init__(self) -> None:
        super().__init__()
        self._start: tuple[float, float] | None = None

    def render(self, task: Task) -> Text:
        """The rate, once it is known."""
        if self._start is None and task.completed > task.fields["done"]:
            self._start = time.perf_counter(), task.completed
        if self._start is None or task.completed == self._start[1]:
            return Text("compiling" if self._start is None else "")
        return Text(f"{(task.completed - self._start[1]) / (time.perf_counter() - self._start[0]):.3g}/s")
