"""What a run tells while it runs: a progress line, numbers and sample grids."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mpdit_jax.io.pictures import save_png
from mpdit_jax.train.writers import METRICS_FILE, MetricsFile, TensorBoard, WeightsAndBiases, Writer


class RunLogger:
    """Everything a run tells, in one place; a context manager. Unless it `is_primary` it prints and writes nothing."""

    def __init__(
        self,
        workdir: Path,
        start: int,
        total: int,
        batch_size: int,
        *,
        is_primary: bool = True,
        wandb_project: str = "",
    ) -> None:
        """Open the files of a run that continues at step `start`."""
        self._samples, self._speaks = workdir / "samples", is_primary
        self._writers: list[Writer] = []
        self._metrics = MetricsFile(workdir / METRICS_FILE, start) if is_primary else None
        if is_primary:
            self._writers.append(TensorBoard(workdir / "tensorboard", start))
            if wandb_project:
                self._writers.append(WeightsAndBiases(workdir, wandb_project))
        self._spikes = LossSpikes()
        self._progress = ProgressLine(start, total, batch_size, quiet=not is_primary)

    def __enter__(self) -> "RunLogger":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        if self._metrics is not None:
            self._metrics.close()
        for writer in self._writers:
            writer.close()

    def config(self, step: int, text: str) -> None:
        """The config as JSON."""
        for writer in self._writers:
            writer.config(step, text)

    def advance(self, step: int) -> None:
        """A step has been dispatched."""
        self._progress.advance(step)

    def metrics(self, step: int, values: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """A window of the log has ended with these means; the timings, different every time, stay out of the file."""
        if self._metrics is not None:
            self._metrics.write(step, values)
        for writer in self._writers:
            writer.scalars(step, {**values, **timings})
        self._progress.logged(step, values.get("loss", math.nan))
        spike = self._spikes.judge(values)
        if spike:
            self.say(f"step {step}: {spike}")

    def skipped(self, steps: Sequence[int], count: int) -> None:
        """So many steps since the last line were left out, these first."""
        if count:
            named = ", ".join(f"{step} (batch {step - 1})" for step in steps)
            more = f" and {count - len(steps)} more" if count > len(steps) else ""
            self.say(
                f"left out, since loss or gradient was not finite or spiked: step {named}{more}; see why with "
                f"--replay_step={steps[0]}"
            )

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of samples drawn at this step, on a line of their own; nothing if there are none."""
        if not values:
            return
        if self._metrics is not None:
            self._metrics.write(step, values)
        for writer in self._writers:
            writer.scalars(step, values)
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def picture(self, step: int, picture: np.ndarray) -> None:
        """A grid of samples, uint8 (H, W, 1 or 3)."""
        if self._speaks:
            save_png(self._samples / f"{step:08d}.png", picture)
        for writer in self._writers:
            writer.image(step, "samples", picture)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._progress.say(message)


class LossSpikes:
    """Tells when the largest loss of a window stands out from the mean losses of the windows before it."""

    FACTOR, WARM, DECAY = 3.0, 5, 0.9  # times the running mean; windows before the first verdict; of the running mean

    def __init__(self) -> None:
        self._mean, self._seen = math.nan, 0

    def judge(self, values: Mapping[str, float]) -> str:
        """A sentence about the window, empty if it is like the others."""
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
    """A live line in a terminal, a line a logged step elsewhere: step, loss, images/s, time left."""

    def __init__(self, start: int, total: int, batch_size: int, *, quiet: bool = False) -> None:
        self._start, self._total, self._batch_size = start, total, batch_size
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False, quiet=quiet)
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(f"step {start}/{total}  compiling", total=total, completed=start)
        self._loss = math.nan
        # The first step compiles and is left out of every rate.
        self._since, self._since_step = time.perf_counter(), start

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """A step has been dispatched."""
        if step == self._start + 1:
            self._since, self._since_step = time.perf_counter(), step
        self._bar.update(self._task, completed=step, description=self._describe(step))

    def logged(self, step: int, loss: float) -> None:
        """A window of the log has ended with this mean loss."""
        self._loss = loss
        self._bar.update(self._task, description=self._describe(step))
        if not self._console.is_terminal:
            self._console.print(self._describe(step))

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._bar.print(message) if self._console.is_terminal else self._console.print(message)

    def images_per_second(self, step: int) -> float:
        """Mean rate since the first step of this process."""
        seconds = time.perf_counter() - self._since
        return (step - self._since_step) * self._batch_size / seconds if step > self._since_step else math.nan

    def _describe(self, step: int) -> str:
        rate = self.images_per_second(step)
        loss = "" if math.isnan(self._loss) else f"  loss {self._loss:.4f}"
        if math.isnan(rate):
            return f"step {step}/{self._total}{loss or '  starting'}"
        left = (self._total - step) * self._batch_size / rate
        return f"step {step}/{self._total}{loss}  {rate:,.0f} images/s  {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
