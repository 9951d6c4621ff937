"""What a run reports: a progress line, metrics, sample grids."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import FrozenConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mpdit_jax.config.base import to_json
from mpdit_jax.io.pictures import save_png
from mpdit_jax.train.writers import METRICS_FILE, MetricsFile, TensorBoard, WeightsAndBiases


class RunLogger:
    """Prints and writes the reports of a run, on process 0; a context manager."""

    def __init__(self, workdir: Path, config: FrozenConfigDict, start: int, *, is_primary: bool = True) -> None:
        """Open the files of a run that continues after `start` steps; unless it `is_primary`, none."""
        self._samples, self._spikes = workdir / "samples", LossSpikes()
        self._metrics = MetricsFile(workdir / METRICS_FILE, start) if is_primary else None
        self._writers: list[TensorBoard | WeightsAndBiases] = []
        if is_primary:
            self._writers.append(TensorBoard(workdir / "tensorboard", start))
        if is_primary and config.log.wandb_project:
            self._writers.append(WeightsAndBiases(workdir, config.log.wandb_project))
        for writer in self._writers:
            writer.config(start, to_json(config))
        self._progress = ProgressLine(start, config.steps, config.batch_size, quiet=not is_primary)

    def __enter__(self) -> "RunLogger":
        self._progress.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.bar.stop()
        if self._metrics is not None:
            self._metrics.close()
        for writer in self._writers:
            writer.close()

    def advance(self, step: int) -> None:
        """Show that a step was dispatched."""
        self._progress.advance(step)

    def metrics(
        self, step: int, values: Mapping[str, float], skipped: Sequence[int], timings: Mapping[str, float]
    ) -> None:
        """Write the values of a window that ends at `step`, and its timings, which `metrics.jsonl` leaves out.

        The first `skipped` steps are printed; `values["skipped"]` counts them all.
        """
        self._write(step, values, timings)
        self._progress.logged(step, values.get("loss", math.nan))
        if spike := self._spikes.describe(values):
            self.say(f"step {step}: {spike}")
        if skipped:
            named = ", ".join(f"{step} (batch {step - 1})" for step in skipped)
            more = f" and {values['skipped'] - len(skipped):.0f} more" if values["skipped"] > len(skipped) else ""
            self.say(
                f"left out, since loss or gradient was not finite or spiked: step {named}{more}; see why with "
                f"--replay_step={skipped[0]}"
            )

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Print and write the metrics of an evaluation, if there are any."""
        if values:
            self._write(step, values, {})
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def picture(self, step: int, picture: np.ndarray) -> None:
        """Write a grid of samples, uint8 (H, W, 1 or 3); on process 0 alone."""
        save_png(self._samples / f"{step:08d}.png", picture)
        for writer in self._writers:
            writer.image(step, "samples", picture)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._progress.say(message)

    def _write(self, step: int, values: Mapping[str, float], timings: Mapping[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(step, values)
        for writer in self._writers:
            writer.scalars(step, {**values, **timings})


class LossSpikes:
    """Finds windows whose largest loss stands out from the mean losses of the windows before."""

    FACTOR, WARM, DECAY = 3.0, 5, 0.9  # times the running mean; windows before the first verdict; of the running mean

    def __init__(self) -> None:
        self._mean, self._seen = math.nan, 0

    def describe(self, values: Mapping[str, float]) -> str:
        """A sentence about the window if it spikes, else ""."""
        if "loss" not in values or "largest_loss" not in values:
            return ""
        mean, largest = self._mean, values["largest_loss"]
        self._mean = values["loss"] if not self._seen else self.DECAY * mean + (1 - self.DECAY) * values["loss"]
        self._seen += 1
        if self._seen <= self.WARM or largest <= self.FACTOR * mean:
            return ""
        return (
            f"the loss spiked to {largest:.4g} in step {values['largest_loss_step']:.0f}, {largest / mean:.1f} times "
            f"its running mean {mean:.4g}"
        )


class ProgressLine:
    """A live line in a terminal, and elsewhere one line a logged step: step, loss, images/s, time left."""

    def __init__(self, start: int, total: int, batch_size: int, *, quiet: bool = False) -> None:
        self._first, self._total, self._batch_size = start + 1, total, batch_size
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False, quiet=quiet)
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self.bar.add_task(f"step {start}/{total}  compiling", total=total, completed=start)
        self._loss, self._since = math.nan, math.inf

    def advance(self, step: int) -> None:
        """Show that a step was dispatched."""
        if step == self._first:  # it compiles, and no rate counts it
            self._since = time.perf_counter()
        self.bar.update(self._task, completed=step, description=self._describe(step))

    def logged(self, step: int, loss: float) -> None:
        """Show the mean loss of a window."""
        self._loss = loss
        self.bar.update(self._task, description=self._describe(step))
        if not self._console.is_terminal:
            self._console.print(self._describe(step))

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.bar.print(message) if self._console.is_terminal else self._console.print(message)

    def _describe(self, step: int) -> str:
        text = f"step {step}/{self._total}" + ("" if math.isnan(self._loss) else f"  loss {self._loss:.4f}")
        if step <= self._first:
            return text if "loss" in text else f"{text}  starting"
        rate = (step - self._first) * self._batch_size / (time.perf_counter() - self._since)
        return f"{text}  {rate:,.0f} images/s  {_duration((self._total - step) * self._batch_size / rate)} left"


def _duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
