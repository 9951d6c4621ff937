"""What a run tells while it runs: a progress line, `metrics.jsonl`, TensorBoard event files, sample grids."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from mpdit_jax.files import replacing
from mpdit_jax.images import encode_png, save_png


class Report:
    """Everything a run tells, in one place; a context manager. Unless it `speaks` it prints and writes nothing."""

    def __init__(self, workdir: Path, start: int, total: int, batch_size: int, *, speaks: bool = True) -> None:
        self._samples = workdir / "samples"
        self._metrics = MetricsFile(workdir / "metrics.jsonl", start) if speaks else None
        self._tensorboard = TensorBoard(workdir / "tensorboard", start) if speaks else None
        self._progress = ProgressLine(start, total, batch_size, quiet=not speaks)

    def __enter__(self) -> "Report":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        for writer in (self._metrics, self._tensorboard):
            if writer is not None:
                writer.close()

    def config(self, step: int, text: str) -> None:
        """The config as JSON, for TensorBoard's text page."""
        if self._tensorboard is not None:
            self._tensorboard.text(step, "config", f"```json\n{text}```")

    def advance(self, step: int) -> None:
        """A step has been dispatched."""
        self._progress.advance(step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """A window of the log has ended with these means."""
        if self._metrics is not None:
            self._metrics.write(step, values)
        if self._tensorboard is not None:
            rate = {"images_per_second": self._progress.images_per_second(step)}
            self._tensorboard.scalars(step, {**values, **rate})
        self._progress.logged(step, values.get("loss", math.nan))
        if values.get("skipped"):
            self.say(f"step {step}: {values['skipped']:.0f} steps since the last line were left out")

    def picture(self, step: int, picture: np.ndarray) -> None:
        """A grid of samples, uint8 (H, W, 1 or 3)."""
        if self._tensorboard is not None:
            save_png(self._samples / f"{step:08d}.png", picture)
            self._tensorboard.image(step, "samples", picture)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._progress.say(message)


class MetricsFile:
    """`metrics.jsonl`: one line of deterministic numbers a logged step, never two of one step.

    Timings go to TensorBoard only, so that this file is the same for a resumed run and an undisturbed one.
    """

    def __init__(self, path: Path, start: int) -> None:
        """Keep the lines up to step `start`; later ones belong to steps that will be run again."""
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= start:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError, TypeError):
                    break  # a line cut short by a crash is the last one
            with replacing(path) as file:
                file.write("".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a", buffering=1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


class TensorBoard:
    """Event files with scalars, images and text, written without TensorFlow."""

    def __init__(self, folder: Path, start: int) -> None:
        """Tell TensorBoard to forget what an earlier process wrote of steps after `start`."""
        self._writer = EventFileWriter(str(folder))
        self._writer.add_event(
            Event(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START))
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point on each curve."""
        self._add(step, Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """A picture, uint8 (H, W, 1 or 3)."""
        height, width, channels = picture.shape
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encode_png(picture))
        self._add(step, Summary(value=[Summary.Value(tag=tag, image=image)]))

    def text(self, step: int, tag: str, text: str) -> None:
        """Markdown text."""
        metadata = SummaryMetadata()
        metadata.CopyFrom(create_summary_metadata(display_name=tag, description=""))
        value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto([text.encode()]))
        self._add(step, Summary(value=[value]))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()

    def _add(self, step: int, summary: Summary) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


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
        if math.isnan(rate):
            return f"step {step}/{self._total}  starting"
        left = (self._total - step) * self._batch_size / rate
        loss = "" if math.isnan(self._loss) else f"  loss {self._loss:.4f}"
        return f"step {step}/{self._total}{loss}  {rate:,.0f} images/s  {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
