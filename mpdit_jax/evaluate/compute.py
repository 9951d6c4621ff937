"""From a set of images to its statistics."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpdit_jax.data.image_sets import ImageSet
from mpdit_jax.evaluate.agreement import agree, portable
from mpdit_jax.evaluate.extraction import FeatureFolder, extract
from mpdit_jax.evaluate.extractors import Extractor
from mpdit_jax.evaluate.moments import Moments, merge_processes
from mpdit_jax.evaluate.statistics import OF_SINGLE_IMAGES, Statistics, from_moments

_NEEDS = {"sfd": "spatial", "is": "probs"}


def needed(metrics: Sequence[str]) -> list[str]:
    """The outputs of an extractor that metrics are computed from."""
    return sorted({"pool", *(_NEEDS[name] for name in metrics if name in _NEEDS)})


def kept(metrics: Sequence[str]) -> list[str]:
    """Those of them that metrics need of every single image, which take memory in proportion to the images."""
    single = ["pool"] if OF_SINGLE_IMAGES & set(metrics) else []
    return single + (["probs"] if "is" in metrics else [])


def compute_statistics(
    extractor: Extractor,
    images: ImageSet,
    outputs: Sequence[str],
    keep: Sequence[str],
    scratch: Path,
    verb: str,
) -> Statistics:
    """The statistics of a set of images. Interrupted, the same call goes on where it was: `scratch` has the features.

    Every process looks at its share of the blocks, in the copy of the set that it finds, and the sums are merged. Only
    what is kept of single images is read by all: one block is in memory beside it.

    Args:
        extractor: the network, the same on all processes.
        images: what it looks at.
        outputs: which of the extractor's to look at, see `needed`.
        keep: which of them to keep of every image, see `kept`.
        scratch: a folder that all processes see.
        verb: of the progress bar.

    Raises:
        InputError, DataError: images that cannot be looked at, or a damaged block.
        ProcessError: the processes find sets that differ.
    """
    agree(portable(images.about))
    folder = FeatureFolder(scratch, extractor, images, outputs)
    extract(extractor, images, outputs, folder, verb)
    moments = {name: Moments.empty(extractor.outputs[name]) for name in ("pool", "spatial") if name in outputs}
    whole = {name: np.empty((len(images), extractor.outputs[name]), np.float32) for name in keep}
    for number in range(folder.count):
        if not (keep or folder.is_mine(number)):
            continue
        part = folder.read(number)
        for name in keep:
            whole[name][folder.rows(number)] = part[name]
        if folder.is_mine(number):
            moments = {name: seen.update(part[name]) for name, seen in moments.items()}
    merged = {name: merge_processes(seen) for name, seen in moments.items()}
    return from_moments(extractor, merged, whole.get("pool"), whole.get("probs"), images.about)
