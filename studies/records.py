"""Results of a study, one JSON line a finished run, so that the same command continues after any interruption."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mpdit_jax.errors import DataError, MissingExtraError
from mpdit_jax.runtime.progress import WorkBar

Record = dict[str, Any]


class Records:
    """The records of one file. Each has the settings of its run, by which it is found again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[Record] = []
        if path.is_file():
            *lines, last = path.read_text().split("\n")
            try:
                self.found = [json.loads(line) for line in lines]
            except json.JSONDecodeError as error:
                raise DataError(f"{path} has a line that is not JSON ({error}): repair or remove it.") from error
            if last:  # an interrupted write: the run is done again
                self._write(self.found)

    def of(self, settings: Record) -> Record | None:
        """The record with all these settings, if its run has been done."""
        return next((record for record in self.found if settings.items() <= record.items()), None)

    def run(self, title: str, runs: Iterable[Record], measure: Callable[[Record], Record]) -> list[Record]:
        """The records of all `runs`, those that are missing measured and added to the file."""
        settings = list(runs)
        todo = [each for each in settings if self.of(each) is None]
        with WorkBar(title, "runs", len(settings), len(settings) - len(todo)) as bar:
            bar.say(f"{len(settings) - len(todo)} of {len(settings)} runs are in {self.path}")
            for each in todo:
                self.found.append({**each, **measure(each)})
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps(self.found[-1]) + "\n")
                bar.say(json.dumps(self.found[-1]))
                bar.advance(1)
        return [record for each in settings if (record := self.of(each)) is not None]

    def _write(self, records: list[Record]) -> None:
        from mpdit_jax.io.atomic import atomic_write

        with atomic_write(self.path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())


def pyplot() -> Any:
    """Matplotlib's plots, drawn to files.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: `pip install 'mpdit_jax[docs]'`.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plots

    return plots
