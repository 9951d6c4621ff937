"""What a run reports: a progress line, metrics, sample grids."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import FrozenConfigDict

from mpdit_jax.config.base import to_json
from mpdit_jax.io.pictures import save_png
from mpdit_jax.runtime.progress import ProgressBar
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
        self._bar = ProgressBar(config.steps, start, quiet=not is_primary)
        self._loss, self._batch_size = "", config.batch_size

    def __enter__(self) -> "RunLogger":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)
        if self._metrics is not None:
            self._metrics.close()
        for writer in self._writers:
            writer.close()

    def advance(self, step: int) -> None:
        """Show that a step was dispatched."""
        self._show(step)

    def metrics(
        self, step: int, values: Mapping[str, float], skipped: Sequence[int], timings: Mapping[str, float]
    ) -> None:
        """Write the values of a window that ends at `step`, and its timings, which `metrics.jsonl` leaves out.

        `skipped` has the first skipped steps, which are printed; `values["skipped"]` is the number of all of them.
        """
        self._write(step, values, timings)
        if "loss" in values:
            self._loss = f"  loss {values['loss']:.4f}"
        text = self._show(step)
        if not self._bar.is_live:
            self.say(text)
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
        self._bar.say(message)

    def _show(self, step: int) -> str:
        pace = self._bar.pace(step)
        speed = f"  {pace[0] * self._batch_size:,.0f} images/s  {pace[1]} left" if pace else ""
        text = f"step {step}/{self._bar.total}{self._loss}{speed}"
        self._bar.show(step, text)
        return text

    def _write(self, step: int, values: Mapping[str, float], timings: Mapping[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(step, values)
        for writer in self._writers:
            writer.scalars(step, {**values, **timings})


class LossSpikes:
    """Finds windows whose largest loss stands out from the mean losses of the windows before."""

    # A spike is FACTOR times the running mean, of decay DECAY; the first WARM windows are none.
    FACTOR, WARM, DECAY = 3.0, 5, 0.9

    def __init__(self) -> None:
        self._mean, self._seen = math.nan, 0

    def describe(self, values: Mapping[str, float]) -> str:
        """Return a sentence about the window if it spikes, else ""."""
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
