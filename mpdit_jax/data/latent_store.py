"""A store of latents on disk: ArrayRecord shards and a manifest that describes them.

STORE/manifest.json                         written last: a folder that has one is finished
STORE/labels.npy                            int32 (N,), the labels in order
STORE/shard-00002-of-00313.array_record     one record an example, all of one length, see `record_dtype`
STORE/rejected.jsonl                        the images that could not be used, and why
STORE/.shard-….array_record.json            prepare's report on a shard, so that only lost shards are made again
"""

import dataclasses
import hashlib
import json
import math
import re
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mpdit_jax.errors import DataError
from mpdit_jax.io.json_files import digest_of, parse_json
from mpdit_jax.io.npz import read_npy

SCHEMA_VERSION = 1
MANIFEST, LABELS, REJECTED = "manifest.json", "labels.npy", "rejected.jsonl"
_LARGEST_RECORD = 2**28  # bytes, far beyond any latent
_OTHER_FILES = 512  # what JAX, loggers and checkpoints may open
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # records are read one here, one there


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records."""

    name: str
    examples: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a store."""

    latent_shape: tuple[int, int, int]  # (h, w, C) of an example
    views: int  # 1, or 2 where the moments of the mirrored image are stored as well
    key_bytes: int  # length of the longest source key
    image_size: int  # pixels along each side of the square that was encoded
    vae_fingerprint: str  # SHA-256 of the weights that encoded, see `VAE.fingerprint`
    class_names: tuple[str, ...]  # in label order
    class_counts: tuple[int, ...]  # examples of each class
    latent_mean: tuple[float, ...]  # of each channel, (C,)
    latent_std: tuple[float, ...]  # likewise, of samples from the posteriors
    scaling_factor: float  # of the VAE's config: `(latents - shift_factor) * scaling_factor`
    shift_factor: float
    rejected: int  # images left out
    source: str  # the images that were encoded, as given to `prepare`
    labels_sha256: str
    shards: tuple[Shard, ...]

    @property
    def examples(self) -> int:
        """The number of examples."""
        return sum(shard.examples for shard in self.shards)

    @property
    def contents(self) -> str:
        """A digest of all records and labels."""
        return digest_of([self.labels_sha256, *(shard.sha256 for shard in self.shards)])


def record_dtype(latent_shape: tuple[int, int, int], views: int, key_bytes: int) -> np.dtype:
    """Return the little-endian layout of a record: float16 `mean` and `std` (views, h, w, C), int32 `label`, `key`."""
    shape = (views, *latent_shape)
    return np.dtype([("mean", "<f2", shape), ("std", "<f2", shape), ("label", "<i4"), ("key", f"S{key_bytes}")])


def manifest_to_json(manifest: Manifest) -> str:
    """Write a manifest as indented JSON, with the schema's version and the number of examples in front."""
    fields = dataclasses.asdict(manifest)
    return json.dumps({"schema_version": SCHEMA_VERSION, "examples": manifest.examples, **fields}, indent=1) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a store; raises DataError if there is none, or one damaged or of another schema."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder} holds no finished latents ({MANIFEST} is missing): make them with `python -m mpdit_jax.prepare "
            f"--images=FOLDER --vae=FOLDER --image_size=256 --out={folder}`, which also finishes what was interrupted."
        )
    try:
        stored: dict[str, Any] = parse_json(path.read_text())
        version, examples = stored.pop("schema_version"), stored.pop("examples")
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {version} and this mpdit_jax reads version {SCHEMA_VERSION}: update "
                "mpdit_jax, or prepare the latents again."
            )
        shards = tuple(Shard(**shard) for shard in stored.pop("shards"))
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in stored.items()}
        manifest = Manifest(**fields, shards=shards)
        channels = manifest.latent_shape[2]
        consistent = (
            manifest.examples == examples == sum(manifest.class_counts)
            and len(manifest.class_counts) == len(manifest.class_names)
            and len(manifest.latent_mean) == len(manifest.latent_std) == channels
            and manifest.views in (1, 2)
            and manifest.scaling_factor > 0
            and math.isfinite(manifest.scaling_factor + manifest.shift_factor)
            and 0 < record_dtype(manifest.latent_shape, manifest.views, manifest.key_bytes).itemsize < _LARGEST_RECORD
            and all(map(_is_sound, shards))
            and all(isinstance(name, str) for name in manifest.class_names)
            and all(isinstance(count, int) and count >= 0 for count in manifest.class_counts)
            and all(math.isfinite(value) for value in (*manifest.latent_mean, *manifest.latent_std))
            and all(value >= 0 for value in manifest.latent_std)
            and isinstance(manifest.vae_fingerprint, str)
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({error}); prepare the latents again.") from error
    if not consistent:
        raise DataError(f"{path} contradicts itself: its counts, shapes or statistics do not fit; prepare again.")
    return manifest


def _is_sound(shard: Shard) -> bool:
    """Return whether a shard has possible numbers, and a name that stays in the folder."""
    plain = isinstance(shard.name, str) and re.fullmatch(r"[^/\\\0]*[^/\\\0.][^/\\\0]*", shard.name) is not None
    return plain and all(isinstance(size, int) and size >= 0 for size in (shard.examples, shard.bytes))


class LatentStore:
    """The examples of a store, readable at any index by several threads at once."""

    def __init__(self, folder: str | Path) -> None:
        """Open a store without reading its shards.

        Raises:
            DataError: it is damaged, or has more shards than this process may open.
        """
        self.folder = Path(folder)
        self.manifest = manifest = read_manifest(self.folder)
        allow_open_files(len(manifest.shards), str(folder))
        for shard in manifest.shards:
            path = self.folder / shard.name
            found = path.stat().st_size if path.is_file() else -1
            if found != shard.bytes:
                problem = "is missing" if found < 0 else f"has {found} bytes instead of {shard.bytes}"
                raise DataError(f"{path} {problem}: copy it again, or repeat the prepare command, which makes it anew.")
        self.labels = _read_labels(self.folder, manifest)
        self._dtype = record_dtype(manifest.latent_shape, manifest.views, manifest.key_bytes)
        self._starts = np.cumsum([0, *[shard.examples for shard in manifest.shards]])
        self._readers: dict[int, Any] = {}
        self._locks = [threading.Lock() for _ in manifest.shards]

    def __len__(self) -> int:
        return self.manifest.examples

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Read the records at `indices` (n,): an array (n,) of `record_dtype`; raises DataError for a damaged shard."""
        return np.frombuffer(b"".join(self._records(indices)), self._dtype)

    def moments(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read mean and standard deviation of the examples at `indices` (n,), each float16 (n, views, h, w, C)."""
        shape = (self.manifest.views, *self.manifest.latent_shape)
        size = 2 * math.prod(shape)  # bytes
        mean, std = (np.empty((len(indices), *shape), "<f2") for _ in range(2))
        # Each record is copied once and through plain buffers: arrays made for each would cost more than the copy.
        means, stds = (array.reshape(-1).view(np.uint8).data for array in (mean, std))
        for place, record in enumerate(self._records(indices)):
            start, view = place * size, memoryview(record)
            means[start : start + size], stds[start : start + size] = view[:size], view[size : 2 * size]
        return mean, std

    def _records(self, indices: np.ndarray) -> Iterator[bytes]:
        """Read records one by one: a list of scattered ones takes ArrayRecord three times as long."""
        size = self._dtype.itemsize
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for number, row in zip(shards.tolist(), (indices - self._starts[shards]).tolist(), strict=True):
            try:
                with self._locks[number]:  # a reader has one position
                    if number not in self._readers:
                        path = self.folder / self.manifest.shards[number].name
                        self._readers[number] = ArrayRecordReader(str(path), _READER_OPTIONS)
                    reader = self._readers[number]
                    reader.seek(row)
                    record: bytes = reader.read()
                if len(record) != size:
                    raise ValueError(f"a record is {len(record)} bytes long instead of {size}")
            except (RuntimeError, ValueError, IndexError) as error:
                raise DataError(
                    f"{self.folder / self.manifest.shards[number].name} is damaged "
                    f"({str(error).splitlines()[0][:200]}): see `python -m mpdit_jax.prepare --verify "
                    f"--out={self.folder}`."
                ) from error
            yield record


def allow_open_files(count: int, folder: str) -> None:
    """Raise this process's limit of open files for `count` shards; raises DataError if the system does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise DataError(
            f"{folder} has {count} shards and this process may open {hard} files: raise the limit (`ulimit -Hn "
            f"{needed}` as an administrator), or prepare with a larger --shard_size."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_labels(folder: Path, manifest: Manifest) -> np.ndarray:
    path = folder / LABELS
    try:
        labels = read_npy(path)
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({error}); copy it again, or repeat the prepare command.") from error
    classes = len(manifest.class_names)
    if labels.dtype != np.int32 or labels.shape != (manifest.examples,):
        raise DataError(f"{path}: {labels.dtype} {labels.shape}; expected int32 ({manifest.examples},); prepare again.")
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        bad = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{path}: label {bad} is outside 0 to {classes - 1}; prepare again.")
    if not np.array_equal(np.bincount(labels, minlength=classes), manifest.class_counts):
        raise DataError(f"{path} does not have the manifest's number of examples of every class; prepare again.")
    return labels
