"""Progress bars with the rate and the time left; lines instead of a bar if the output is not a terminal."""

import datetime
import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_LOG_EVERY = 10  # seconds


class ProgressBar:
    """A bar with a text on a terminal; a context manager.

    Args:
        total: the number of units.
        done: the number of units that an earlier process has done.
        quiet: show nothing.
        lines: show no bar on a terminal either, because another bar is live.
    """

    def __init__(self, total: int, done: int = 0, *, quiet: bool = False, lines: bool = False) -> None:
        terminal = False if lines else None
        console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet, force_terminal=terminal)
        columns = BarColumn(bar_width=24), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("compiling", total=total, completed=done)
        self.total, self.done = total, done
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    @property
    def is_live(self) -> bool:
        """Whether a bar is shown. False once the terminal is closed, so that the next line fails and ends the run."""
        return self._bar.console.is_terminal

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(message)

    def show(self, done: int, text: str) -> None:
        """Show that `done` units are done, and a text."""
        self.done = done
        self._bar.update(self._task, completed=done, description=text)

    def pace(self, done: int) -> tuple[float, str] | None:
        """Units per second in this process and the time left, once `done` units are done; None until the second call.

        The units before the first call are left out, as their time includes compilation.
        """
        if self._first is None:
            self._first = time.perf_counter(), done
        since, first = self._first
        if done == first:
            return None
        rate = (done - first) / (time.perf_counter() - since)
        return rate, str(datetime.timedelta(seconds=round((self.total - done) / rate)))


class WorkBar(ProgressBar):
    """A bar for counted work, such as `WorkBar("sampling", "images", total)`.

    A log gets a line for the first `advance`, for the last, and every 10 seconds; with `lines`, every 10 seconds only.
    """

    def __init__(
        self, verb: str, unit: str, total: int, done: int = 0, *, quiet: bool = False, lines: bool = False
    ) -> None:
        super().__init__(total, done, quiet=quiet, lines=lines)
        self._verb, self._unit, self._lines = verb, unit, lines
        self._last = time.monotonic() if lines else -math.inf

    def __enter__(self) -> "WorkBar":
        super().__enter__()
        return self

    def advance(self, count: int) -> None:
        """Count `count` more units."""
        done, now = self.done + count, time.monotonic()
        pace = self.pace(done)
        speed = f"  {pace[0]:.3g}/s  {pace[1]} left" if pace else ""
        text = f"{self._verb} {done}/{self.total} {self._unit}{speed}"
        self.show(done, text)
        if not self.is_live and (now - self._last >= _LOG_EVERY or (done == self.total and not self._lines)):
            self._last = now
            self.say(text)
