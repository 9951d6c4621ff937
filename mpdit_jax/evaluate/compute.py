"""Compute the statistics of an extractor's features over a set of images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from mpdit_jax.data.image_sets import ImageSet
from mpdit_jax.distributed.collectives import any_process, assert_equal_across_processes, barrier
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.evaluate.extractors import Extractor, Features
from mpdit_jax.evaluate.moments import Moments, gather_rows, merge_processes
from mpdit_jax.evaluate.shared_values import name_from_process_0, portable
from mpdit_jax.evaluate.statistics import OF_SINGLE_IMAGES, Statistics, from_moments
from mpdit_jax.io.json_files import digest_of
from mpdit_jax.io.npz_blocks import NpzBlocks
from mpdit_jax.runtime.progress import WorkBar
from mpdit_jax.sample.drawing import own_blocks

BLOCK = 512  # images whose features are stored in one file
_NEEDS = {"sfd": "spatial", "is": "probs"}


class StopRequested(Exception):
    """Raised on all processes when one of them was asked to stop in the middle of a pass."""


def needed(metrics: Sequence[str]) -> list[str]:
    """Return the extractor's outputs that metrics are computed from."""
    return sorted({"pool", *(_NEEDS[name] for name in metrics if name in _NEEDS)})


def kept(metrics: Sequence[str]) -> list[str]:
    """Return the outputs kept for every image; memory grows with the set."""
    single = ["pool"] if OF_SINGLE_IMAGES & set(metrics) else []
    return single + (["probs"] if "is" in metrics else [])


def compute_statistics(
    extractor: Extractor,
    images: ImageSet,
    outputs: Sequence[str],
    keep: Sequence[str],
    verb: str,
    *,
    batch_size: int,
    block_size: int | None = None,
    scratch: Path | None = None,
    stopped: Callable[[], bool] | None = None,
    mesh: Mesh | None = None,
) -> Statistics:
    """Extract the features of a set of images and merge their moments. Collective.

    Every process reads its own blocks of the set, see `own_blocks`. Images that `images.read` leaves out do not count.

    Args:
        extractor: the network, the same on all processes.
        images: a set, or samples that are drawn when they are read.
        outputs: the extractor's outputs to compute, see `needed`.
        keep: the outputs to keep for every image, see `kept`.
        verb: label of the progress bar.
        batch_size: images read at a time.
        block_size: images of a block; default `BLOCK` with `scratch`, else `batch_size`.
        scratch: a shared folder for finished blocks; the same call continues from them.
        stopped: called before every block; returns whether this process was asked to stop. Progress is shown in lines.
        mesh: this process's devices; default all local devices.

    Raises:
        InputError, DataError: images that cannot be read, features that are not finite, or a damaged block.
        ProcessError: the processes find different sets.
        StopRequested: see `stopped`.
    """
    assert_equal_across_processes(portable(images.about))
    mesh = make_mesh(devices=jax.local_devices()) if mesh is None else mesh
    block_size = block_size or (batch_size if scratch is None else BLOCK)
    stored = None if scratch is None else _stored_blocks(scratch, extractor, images, outputs, block_size)
    mine, index, count = own_blocks(len(images), block_size), jax.process_index(), jax.process_count()
    finished = [number for number in mine if stored is not None and stored.has(number)]
    total, done = sum(map(len, mine.values())), sum(len(mine[number]) for number in finished)
    moments = {name: Moments.empty(extractor.outputs[name]) for name in ("pool", "spatial") if name in outputs}
    parts = {name: [np.zeros((0, extractor.outputs[name]), np.float32)] for name in keep}
    numbers = [np.zeros(0, int)]
    in_training = stopped is not None
    with WorkBar(verb, "images", total, done, quiet=in_training and index > 0, lines=in_training) as bar:
        if stored is not None and 0 < done < total:
            bar.say(f"{done} of {total} images are there already, in {stored.folder}")
        for number in range(index, -(-len(images) // (block_size * count)) * count, count):
            if stopped is not None and any_process(stopped()):
                raise StopRequested
            rows = mine.get(number)
            if rows is None:  # in the last round some processes have no block
                continue
            if stored is not None and number in finished:
                features = stored.read(number)
            else:
                with jax.set_mesh(mesh):
                    features = _extract(extractor, images, outputs, rows, batch_size, bar)
                if stored is not None:
                    stored.write(number, features)
            if not len(features["pool"]):
                continue
            moments = {name: seen.update(features[name]) for name, seen in moments.items()}
            for name in keep:
                parts[name].append(features[name])
            numbers.append(rows[: len(features["pool"])])
    barrier("all features are extracted")
    merged = {name: merge_processes(seen) for name, seen in moments.items()}
    order = np.concatenate(numbers)
    whole = {name: gather_rows(np.concatenate(arrays), order) for name, arrays in parts.items()}
    about = {**images.about, "count": merged["pool"].count}
    return from_moments(extractor, merged, whole.get("pool"), whole.get("probs"), about)


def _stored_blocks(
    scratch: Path, extractor: Extractor, images: ImageSet, outputs: Sequence[str], size: int
) -> NpzBlocks:
    """Return the folder of finished blocks, named after everything that decides the features."""
    decides = [extractor.fingerprint, images.about, sorted(outputs), size]
    return NpzBlocks(scratch / name_from_process_0(digest_of(decides)), sorted(outputs))


def _extract(
    extractor: Extractor, images: ImageSet, outputs: Sequence[str], rows: np.ndarray, batch_size: int, bar: WorkBar
) -> Features:
    parts = {name: [np.zeros((0, extractor.outputs[name]), np.float32)] for name in outputs}
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        found = images.read(part)
        if len(found):
            features = extractor(found, part[: len(found)])
            for name in outputs:
                parts[name].append(features[name])
        bar.advance(len(part))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
