"""One shard: read its images, encode them, write its records, say what it holds."""

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from mpdit_jax.data.crop import to_square
from mpdit_jax.data.image_sets import ImageSet, key_bytes_of
from mpdit_jax.data.latent_store import Shard, record_dtype, sha256
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.io.paths import reason

Encode: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Images float32 (B, size, size, channels) in [-1, 1] to mean and std, float16 (B, views, h, w, C)."""

_WRITER_OPTIONS = "group_size:1,uncompressed"  # noise does not compress, and records are read one at a time
_AHEAD = 2  # batches being read while one is encoded


class Stopped(Exception):
    """The work was asked to end before the shard was finished."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What all shards have in common."""

    images: ImageSet
    encode: Encode
    image_size: int
    channels: int
    latent_channels: int
    batch_size: int
    key_bytes: int
    classes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a finished shard holds; beside it as JSON, so that it is not made again.

    Attributes:
        shard: the file.
        labels: of its examples, in order.
        total: of each channel, the sum of the means.
        total_square: of each channel, the sum of mean² + std².
        positions: values summed in each channel.
        rejected: key and reason of the images left out.
    """

    shard: Shard
    labels: list[int]
    total: list[float]
    total_square: list[float]
    positions: int
    rejected: list[tuple[str, str]]


def write_shard(path: Path, rows: range, work: Work, pool: Executor, advance: Callable[[int], None]) -> Report:
    """Encode the images `rows` into the shard `path`; a reader never meets half of it.

    Raises:
        Stopped: from `advance`; nothing is left behind.
        OSError: the disk is full, or refuses otherwise; nothing is left behind either.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    labels, rejected = list[int](), list[tuple[str, str]]()
    total, total_square, positions = np.zeros(work.latent_channels), np.zeros(work.latent_channels), 0
    writer = None
    try:
        writer = _Writer(temporary)
        for count, good, pictures in _read(rows, work, pool, rejected):
            if pictures is not None:
                mean, std = (moments[: len(good)] for moments in work.encode(pictures))
                finite = (np.isfinite(mean) & np.isfinite(std)).reshape(len(good), -1).all(axis=1)
                rejected.extend((key, "latents are not finite") for key in good["key"][~finite])
                mean, std, good = mean[finite], std[finite], good[finite]
                for record in _records(mean, std, good, work.key_bytes):
                    writer.write(record.tobytes())
                labels.extend(good["label"].tolist())
                wide = mean.astype(np.float64)
                total += wide.sum(axis=(0, 1, 2, 3))
                total_square += (wide**2 + std.astype(np.float64) ** 2).sum(axis=(0, 1, 2, 3))
                positions += int(np.prod(mean.shape[:-1]))
            advance(count)
        writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        shard = Shard(path.name, len(labels), temporary.stat().st_size, sha256(temporary))
        temporary.replace(path)
    finally:
        if writer is not None:
            writer.abandon()
        temporary.unlink(missing_ok=True)
    report = Report(shard, labels, total.tolist(), total_square.tolist(), positions, rejected)
    with atomic_write(report_path(path)) as file:
        file.write(json.dumps(dataclasses.asdict(report)).encode())
    return report


class _Writer:
    """An ArrayRecord file; what the system refuses is an OSError, of which ArrayRecord makes a RuntimeError."""

    def __init__(self, path: Path) -> None:
        with _system_errors():
            self._writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)

    def write(self, record: bytes) -> None:
        with _system_errors():
            self._writer.write(record)

    def close(self) -> None:
        with _system_errors():
            self._writer.close()

    def abandon(self) -> None:
        """Close it, if that has not been done, whatever becomes of the file."""
        if self._writer.is_open():
            with suppress(OSError):
                self.close()


@contextmanager
def _system_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OSError(reason(error)) from error


def read_report(path: Path) -> Report | None:
    """The report of a shard if it is finished and still there at its full length."""
    try:
        stored = parse_json(report_path(path).read_text())
        shard = Shard(**stored.pop("shard"))
        rejected = [(str(key), str(reason)) for key, reason in stored.pop("rejected")]
        report = Report(shard, rejected=rejected, **stored)
        return report if path.stat().st_size == shard.bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def report_path(path: Path) -> Path:
    """Where the report of the shard `path` is."""
    return path.with_name(f".{path.name}.json")


def _records(mean: np.ndarray, std: np.ndarray, good: np.ndarray, key_bytes: int) -> np.ndarray:
    shape = (mean.shape[2], mean.shape[3], mean.shape[4])
    records = np.zeros(len(good), record_dtype(shape, mean.shape[1], key_bytes))
    records["mean"], records["std"], records["label"] = mean, std, good["label"]
    records["key"] = [key_bytes_of(key) for key in good["key"]]
    return records


def _read(
    rows: range, work: Work, pool: Executor, rejected: list[tuple[str, str]]
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Batches: how many images were read, `key` and `label` of the good ones, and their pictures in [-1, 1], filled up
    to the batch size by repetition, or None if there are none.
    """

    def load(index: int) -> tuple[np.ndarray, int] | str:
        try:
            image, label = work.images.open(index)
            if not 0 <= label < work.classes:
                return f"label {label} is outside 0 to {work.classes - 1}"
            with image:
                return to_square(image, work.image_size, work.channels), label
        except Exception as error:  # what a broken file raises is up to its decoder
            return (str(error).strip().splitlines() or [type(error).__name__])[0]

    starts = iter(range(rows.start, rows.stop, work.batch_size))
    waiting: collections.deque[tuple[range, list[Future[tuple[np.ndarray, int] | str]]]] = collections.deque()

    def submit() -> None:
        start = next(starts, None)
        if start is not None:
            batch = range(start, min(start + work.batch_size, rows.stop))
            waiting.append((batch, [pool.submit(load, index) for index in batch]))

    for _ in range(1 + _AHEAD):
        submit()
    while waiting:
        batch, futures = waiting.popleft()
        found = [future.result() for future in futures]
        submit()
        pictures, named = list[np.ndarray](), list[tuple[str, int]]()
        for index, one in zip(batch, found, strict=True):
            if isinstance(one, str):
                rejected.append((work.images.keys[index], one))
            else:
                pictures.append(one[0])
                named.append((work.images.keys[index], one[1]))
        good = np.array(named, [("key", object), ("label", np.int32)])
        if not pictures:
            yield len(batch), good, None
            continue
        filled = np.stack(pictures)[np.arange(work.batch_size) % len(pictures)]
        yield len(batch), good, filled.astype(np.float32) / 127.5 - 1
