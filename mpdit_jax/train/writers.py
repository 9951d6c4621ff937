"""Where a run's metrics and pictures are written: `metrics.jsonl`, TensorBoard event files, Weights & Biases."""

import importlib.util
import json
import os
import secrets
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from mpdit_jax.errors import DataWarning, InputError, MissingExtraError, first_line, install_extra
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.io.pictures import encode_png

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """`metrics.jsonl`: one line of deterministic numbers for each logged step, and one for each evaluation.

    Timings go to TensorBoard only, so that this file is the same for a resumed run and an undisturbed one.
    """

    def __init__(self, path: Path, start: int) -> None:
        """Keep the lines up to step `start`; the steps of later ones will be run again."""
        if path.exists():
            lines = path.read_bytes().splitlines()
            kept = [line for number, line in enumerate(lines, 1) if _is_kept(line, start, last=number == len(lines))]
            with atomic_write(path) as file:
                file.write(b"".join(line + b"\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line, which is on the disk before a checkpoint of the same step is."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def _is_kept(line: bytes, start: int, *, last: bool) -> bool:
    try:
        return bool(parse_json(line)["step"] <= start)
    except (ValueError, KeyError, TypeError):
        return not last  # a crash cuts the last line short; a line that the disk damaged is kept for its reader


class TensorBoard:
    """Event files with scalars, images and text, written without TensorFlow."""

    def __init__(self, folder: Path, start: int) -> None:
        """Have TensorBoard forget what an earlier process wrote of steps after `start`."""
        self._writer = EventFileWriter(str(folder))
        self._writer.add_event(
            Event(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START))
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        self._add(step, *(Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()))

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """Add a picture, uint8 (H, W, 1 or 3)."""
        height, width, channels = picture.shape
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encode_png(picture))
        self._add(step, Summary.Value(tag=tag, image=image))

    def config(self, step: int, text: str) -> None:
        """Add the config, as JSON, to the text page."""
        metadata = SummaryMetadata()
        metadata.CopyFrom(create_summary_metadata(display_name="config", description=""))
        tensor = make_tensor_proto([f"```json\n{text}```".encode()])
        self._add(step, Summary.Value(tag="config", metadata=metadata, tensor=tensor))

    def close(self) -> None:
        """Flush and close; warn if the last lines cannot be written."""
        try:
            self._writer.close()
        except OSError as error:
            warnings.warn(f"TensorBoard's files lack their last lines ({error}).", DataWarning, stacklevel=2)

    def _add(self, step: int, *values: Summary.Value) -> None:
        # TensorBoard's thread has reported the error once (`cli.run`). Later calls raise it again, and the run goes on.
        with suppress(OSError):
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


class WeightsAndBiases:
    """A run on Weights & Biases (extra [wandb]), continued under the same name when training continues.

    Its own environment variables say where it is kept: WANDB_MODE=offline keeps everything in the workdir.
    """

    def __init__(self, workdir: Path, project: str) -> None:
        """Start the run of this workdir, or continue it.

        Raises:
            InputError: Weights & Biases takes no run, for example because nobody has logged in.
        """
        import wandb

        path = workdir / "wandb_id.txt"
        name = path.read_text().strip() if path.exists() else ""
        if not (name.isalnum() and len(name) <= 64):
            name = secrets.token_hex(8)
            with atomic_write(path) as file:
                file.write(f"{name}\n".encode())
        self._wandb, quiet = wandb, wandb.Settings(console="off", silent=True)
        try:
            self._run = wandb.init(
                project=project, name=workdir.resolve().name, id=name, resume="allow", dir=str(workdir), settings=quiet
            )
        except wandb.errors.Error as error:
            raise InputError(
                f"config.log.wandb_project={project!r}: Weights & Biases takes no run ({first_line(error)}): `wandb "
                "login` once, set WANDB_MODE=offline, or leave the field empty."
            ) from error
        # After a crash steps repeat. W&B's own steps must rise, so that the axis is a metric named `step`.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        self._run.log({"step": step, **values})

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """Add a picture, uint8 (H, W, 1 or 3)."""
        self._run.log({"step": step, tag: self._wandb.Image(picture)})

    def config(self, step: int, text: str) -> None:
        """Set the fields of the run's config."""
        self._run.config.update(json.loads(text), allow_val_change=True)

    def close(self) -> None:
        """Upload the rest and end."""
        self._run.finish()


def check_wandb(project: str) -> None:
    """Raise MissingExtraError if a project is named and wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise MissingExtraError(
            f"config.log.wandb_project={project!r} needs Weights & Biases: {install_extra('wandb')}, or leave it empty."
        )
