"""From a set of images to its statistics."""

from collections.abc import Sequence
from pathlib import Path

from mpdit_jax.evaluation.extraction import FeatureFolder, extract
from mpdit_jax.evaluation.extractors import Extractor
from mpdit_jax.evaluation.sets import ImageBlocks
from mpdit_jax.evaluation.statistics import Statistics, collect

_NEEDS = {"sfd": "spatial", "is": "probs"}


def needed(metrics: Sequence[str]) -> list[str]:
    """The outputs of an extractor that metrics are computed from."""
    return sorted({"pool", *(_NEEDS[name] for name in metrics if name in _NEEDS)})


def look(extractor: Extractor, images: ImageBlocks, outputs: Sequence[str], scratch: Path, verb: str) -> Statistics:
    """The statistics of a set of images. Interrupted, the same call goes on where it was: `scratch` has the features.

    Raises:
        InputError, DataError: images that cannot be looked at.
    """
    folder = FeatureFolder(scratch, extractor, images, outputs)
    return collect(extractor, extract(extractor, images, outputs, folder, verb), images.about)
