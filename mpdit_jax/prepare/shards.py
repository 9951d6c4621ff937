"""The making of one shard: read images, encode them, write records and a report."""

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from mpdit_jax.data.latent_store import Shard, record_dtype, sha256
from mpdit_jax.data.picture_sets import key_bytes_of
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.io.paths import reason
from mpdit_jax.prepare.plan import Plan

_WRITER_OPTIONS = "group_size:1,uncompressed"  # noise does not compress, and records are read one at a time
_AHEAD = 2  # batches being read while one is encoded


class Stopped(Exception):
    """The command was asked to stop before the shard was finished."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The report on a finished shard, kept beside it as JSON."""

    shard: Shard
    labels: list[int]  # of its examples, in order
    total: list[float]  # of each channel, the sum of the means
    total_square: list[float]  # of each channel, the sum of mean² + std²
    positions: int  # values summed in each channel
    rejected: list[tuple[str, str]]  # key and reason of the images left out


Advance = Callable[[int, list[tuple[str, str]]], None]
"""Called after every batch with the number of images it read, and key and reason of all that the shard has rejected."""


def write_shard(path: Path, rows: range, plan: Plan, pool: Executor, advance: Advance) -> Report:
    """Encode the images `rows` into the shard `path`, which appears when it is finished.

    Raises:
        Stopped, DataError: from `advance`; nothing is left behind.
        OSError: the disk is full or refuses; nothing is left behind either.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    labels, rejected = list[int](), list[tuple[str, str]]()
    total, total_square, positions = np.zeros(plan.vae.latent_channels), np.zeros(plan.vae.latent_channels), 0
    writer = None
    try:
        with _system_errors():
            writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        for count, good, pictures in _read(rows, plan, pool, rejected):
            if pictures is not None:
                mean, std = (moments[: len(good)] for moments in plan.encode(pictures))
                finite = (np.isfinite(mean) & np.isfinite(std)).reshape(len(good), -1).all(axis=1)
                rejected.extend((key, "latents are not finite") for key in good["key"][~finite])
                mean, std, good = mean[finite], std[finite], good[finite]
                with _system_errors():
                    for record in _records(mean, std, good, plan.key_bytes):
                        writer.write(record.tobytes())
                labels.extend(good["label"].tolist())
                wide = mean.astype(np.float64)
                total += wide.sum(axis=(0, 1, 2, 3))
                total_square += (wide**2 + std.astype(np.float64) ** 2).sum(axis=(0, 1, 2, 3))
                positions += int(np.prod(mean.shape[:-1]))
            advance(count, rejected)
        with _system_errors():
            writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        shard = Shard(path.name, len(labels), temporary.stat().st_size, sha256(temporary))
        temporary.replace(path)
    finally:
        if writer is not None and writer.is_open():
            with suppress(RuntimeError):
                writer.close()
        temporary.unlink(missing_ok=True)
    report = Report(shard, labels, total.tolist(), total_square.tolist(), positions, rejected)
    with atomic_write(report_path(path)) as file:
        file.write(json.dumps(dataclasses.asdict(report)).encode())
    return report


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raise refusals of the system as OSError, where ArrayRecord raises RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(reason(error)) from error


def read_report(path: Path) -> Report | None:
    """Return the report of a shard if it is finished and still there at its full length."""
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
    rows: range, plan: Plan, pool: Executor, rejected: list[tuple[str, str]]
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Yield batches: how many images were read, `key` and `label` of the good ones, and their pictures in [-1, 1],
    repeated up to the batch size, or None if there are none. Images that were removed are passed over.
    """
    classes = len(plan.class_names)

    def load(index: int) -> tuple[np.ndarray, int] | str | None:
        if plan.images.keys[index] in plan.images.removed:
            return None
        try:
            image, label = plan.images.decode(index)
            return (image, label) if 0 <= label < classes else f"label {label} is outside 0 to {classes - 1}"
        except Exception as error:  # what a broken file raises is up to its decoder
            return (str(error).strip().splitlines() or [type(error).__name__])[0]

    batches = [range(start, min(start + plan.batch_size, rows.stop)) for start in rows[:: plan.batch_size]]
    waiting: collections.deque[tuple[range, list[Future[tuple[np.ndarray, int] | str | None]]]] = collections.deque()
    for turn, ahead in enumerate([*batches, *[range(0)] * _AHEAD]):
        waiting.append((ahead, [pool.submit(load, index) for index in ahead]))
        if turn < _AHEAD:
            continue
        batch, futures = waiting.popleft()
        found = [future.result() for future in futures]
        pictures, named = list[np.ndarray](), list[tuple[str, int]]()
        for index, one in zip(batch, found, strict=True):
            if isinstance(one, str):
                rejected.append((plan.images.keys[index], one))
            elif one is not None:
                pictures.append(one[0])
                named.append((plan.images.keys[index], one[1]))
        good = np.array(named, [("key", object), ("label", np.int32)])
        if not pictures:
            yield len(batch), good, None
            continue
        filled = np.stack(pictures)[np.arange(plan.batch_size) % len(pictures)]
        yield len(batch), good, filled.astype(np.float32) / 127.5 - 1
