"""Results of a study as one JSON line per finished run, so that the same command continues after an interruption."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mpdit_jax.errors import DataError, MissingExtraError, install_extra
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.runtime.progress import WorkBar

Record = dict[str, Any]


class Records:
    """The records of a file. A record has the settings and the results of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        if path.is_file():
            *lines, last = path.read_text().split("\n")
            try:
                self.records = [json.loads(line) for line in lines]
            except json.JSONDecodeError as error:
                raise DataError(f"{path} has a line that is not JSON ({error}): repair or remove it.") from error
            if last:  # a write was interrupted: remove the partial line
                with atomic_write(path) as file:
                    file.write("".join(line + "\n" for line in lines).encode())

    def find(self, settings: Record) -> Record | None:
        """Return the record with these settings, or None."""
        return next((record for record in self.records if settings.items() <= record.items()), None)

    def run(self, title: str, runs: Iterable[Record], measure: Callable[[Record], Record]) -> list[Record]:
        """Measure the runs (settings) that the file lacks, append their records, and return the records of all runs."""
        runs = list(runs)
        missing = [settings for settings in runs if self.find(settings) is None]
        with WorkBar(title, "runs", len(runs), len(runs) - len(missing)) as bar:
            bar.say(f"{len(runs) - len(missing)} of {len(runs)} runs are in {self.path}")
            for settings in missing:
                record = {**settings, **measure(settings)}
                self.records.append(record)
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                bar.say(json.dumps(record))
                bar.advance(1)
        found = [self.find(settings) for settings in runs]
        return [record for record in found if record is not None]


def pyplot() -> Any:
    """Import matplotlib's pyplot with a backend that draws to files. Raise MissingExtraError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError(f"plots need matplotlib: {install_extra('docs')}.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
