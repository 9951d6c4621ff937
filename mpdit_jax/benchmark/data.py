"""`python -m mpdit_jax.benchmark data`: measure latents per second from a store and from .npy files."""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from mpdit_jax.benchmark.common import check_at_least, make_benchmark_parser, print_report, progress, take_turns, timed
from mpdit_jax.data.latent_store import LABELS, MANIFEST, Manifest, Shard, manifest_to_json, record_dtype, sha256
from mpdit_jax.data.pipeline import batches
from mpdit_jax.data.sources import load_source
from mpdit_jax.errors import InputError

_EXAMPLES = """\
  python -m mpdit_jax.benchmark data
  python -m mpdit_jax.benchmark data --examples=50000 --batch_size=1024 --format=json
"""
_SHARD = 4096  # examples
_TINY = (2, 2, 4)  # latents of the large store, of which only the number of records matters
_WORKERS = 2


def main(arguments: Sequence[str]) -> int:
    """Measure as the arguments say, print, and return the exit status."""
    parser = make_benchmark_parser(
        "data",
        "Measure the input pipeline: shuffled 32x32x4 latents per second from a store with a warm page cache, beside "
        "a folder with one .npy file an example, read by PyTorch's DataLoader with two workers (by two worker "
        "processes where PyTorch is not installed); the two take turns. Then the time from opening a store of --many "
        "examples to its first batch. Everything read is synthetic and lies in a temporary folder.",
        _EXAMPLES,
        repeats=3,
    )
    parser.add_argument("--examples", type=int, default=30_000, help="latents of 32x32x4 (default: %(default)s)")
    parser.add_argument("--many", type=int, default=1_281_167, help="records of the large store (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="latents a batch (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_at_least(options, 1, ("examples", "many", "batch_size", "repeats"))
    if options.batch_size > options.examples:
        raise InputError(f"--batch_size={options.batch_size}: expected at most --examples={options.examples}.")
    return print_report(options, measure(options), _as_text)


def measure(options: Namespace) -> dict[str, Any]:
    """Run the benchmark and return the report as plain numbers and strings."""
    with tempfile.TemporaryDirectory() as scratch:
        progress("making two data sets of the same latents")
        store, files, many = (Path(scratch) / name for name in ("store", "files", "many"))
        make_store(store, options.examples, (32, 32, 4))
        make_files(files, options.examples)
        steps = options.examples // options.batch_size
        name, read_files = _reader(files, options.examples, options.batch_size)
        source = load_source("latents", str(store), "train")

        def read_store() -> None:
            # A new iterator each time, as the DataLoader has: one kept would read ahead while the other is timed.
            epoch = batches(source, options.batch_size, seed=0)
            for _ in range(steps):
                next(epoch)

        tasks = {"store": lambda: timed(read_store), "files": lambda: timed(read_files)}
        take_turns(1, tasks)  # fills the page cache and starts workers
        seconds = take_turns(options.repeats, tasks)
        progress(f"making a store of {options.many:,} small records")
        make_store(many, options.many, _TINY)
        start = time.perf_counter()
        next(batches(load_source("latents", str(many), "train"), options.batch_size, seed=0))
        first = time.perf_counter() - start
    rates = {task: steps * options.batch_size / taken for task, taken in seconds.items()}
    return {
        "examples": options.examples,
        "batch_size": options.batch_size,
        "files_reader": name,
        "store_latents_per_s": rates["store"],
        "files_latents_per_s": rates["files"],
        "store_over_files": rates["store"] / rates["files"],
        "many_examples": options.many,
        "seconds_to_first_batch": first,
    }


def make_store(folder: Path, count: int, shape: tuple[int, int, int]) -> None:
    """Write a store of `count` random moments; large stores repeat the first few thousand."""
    folder.mkdir()
    random, shards = np.random.default_rng(0), []
    records = np.zeros(min(count, _SHARD), record_dtype(shape, 1, 8))
    records["mean"] = random.normal(size=records["mean"].shape)
    records["std"] = 0.1
    records["label"] = np.arange(len(records)) % 1000
    contents = [record.tobytes() for record in records]
    for start in range(0, count, _SHARD):
        path = folder / f"shard-{start // _SHARD:05d}.array_record"
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        examples = min(_SHARD, count - start)
        for content in contents[:examples]:
            writer.write(content)
        writer.close()
        shards.append(Shard(path.name, examples, path.stat().st_size, ""))
    labels = np.concatenate([records["label"][: shard.examples] for shard in shards]).astype(np.int32)
    np.save(folder / LABELS, labels)
    manifest = Manifest(
        latent_shape=shape,
        views=1,
        key_bytes=8,
        image_size=8 * shape[0],
        vae_fingerprint="",
        class_names=tuple(map(str, range(1000))),
        class_counts=tuple(np.bincount(labels, minlength=1000).tolist()),
        latent_mean=(0.0,) * shape[2],
        latent_std=(1.0,) * shape[2],
        scaling_factor=1.0,
        shift_factor=0.0,
        rejected=0,
        source="random",
        labels_sha256=sha256(folder / LABELS),
        shards=tuple(shards),
    )
    (folder / MANIFEST).write_text(manifest_to_json(manifest))


def make_files(folder: Path, count: int) -> None:
    """Write random moments as `features/I.npy` float16 (2, 32, 32, 4) and `labels/I.npy`."""
    (folder / "features").mkdir(parents=True)
    (folder / "labels").mkdir()
    random = np.random.default_rng(0)
    for index in range(count):
        np.save(folder / "features" / f"{index}.npy", random.normal(size=(2, 32, 32, 4)).astype(np.float16))
        np.save(folder / "labels" / f"{index}.npy", np.array([index % 1000]))


class Files:
    """A map-style data set of PyTorch."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.load(self.folder / "features" / f"{index}.npy", allow_pickle=False),
            np.load(self.folder / "labels" / f"{index}.npy", allow_pickle=False),
        )


def _reader(folder: Path, count: int, batch_size: int) -> tuple[str, Callable[[], object]]:
    """Return a reader's name, and a function that reads one shuffled epoch."""
    files = Files(folder, count)
    if find_spec("torch"):
        from torch.utils.data import DataLoader

        loader: Any = DataLoader(
            files,  # type: ignore[arg-type,unused-ignore]
            batch_size,
            shuffle=True,
            num_workers=_WORKERS,
            drop_last=True,
            persistent_workers=True,
            multiprocessing_context="spawn",
        )
        return "DataLoader", lambda: sum(len(labels) for _, labels in loader)
    pool, random = ProcessPoolExecutor(_WORKERS, mp_context=get_context("spawn")), np.random.default_rng(0)

    def chunks() -> Iterator[tuple[Files, list[int]]]:
        order = random.permutation(count)[: count // batch_size * batch_size]
        return ((files, rows.tolist()) for rows in order.reshape(-1, batch_size))

    return "worker processes", lambda: sum(len(labels) for _, labels in pool.map(_load, chunks()))


def _load(chunk: tuple[Files, list[int]]) -> tuple[np.ndarray, np.ndarray]:
    files, rows = chunk
    features, labels = zip(*(files[row] for row in rows), strict=True)
    return np.stack(features), np.stack(labels)


def _as_text(report: Mapping[str, Any]) -> str:
    return (
        f"{report['examples']:,} latents of 32x32x4, batches of {report['batch_size']}, shuffled, page cache warm\n"
        f"  store of ArrayRecord shards       {report['store_latents_per_s']:10,.0f} latents/s\n"
        f"  one .npy an example, {report['files_reader']:<13}{report['files_latents_per_s']:10,.0f} latents/s\n"
        f"  store over files                  {report['store_over_files']:10.1f}x\n"
        f"first batch of {report['many_examples']:,} examples after {report['seconds_to_first_batch']:.2f} s"
    )
