"""The reference of a comparison: saved statistics, real images, or the data that a run is trained on."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from mpdit_jax.config.base import data_identity
from mpdit_jax.config.evaluation import MOST_REAL
from mpdit_jax.data.image_sets import PREFIXES, FindDecode, ImageSet, SourceImages, about_source, open_npz, open_set
from mpdit_jax.data.sources import Source, rows_of
from mpdit_jax.distributed.collectives import assert_equal_across_processes
from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.compute import kept, needed
from mpdit_jax.evaluate.extractors import Extractor
from mpdit_jax.evaluate.shared_values import portable
from mpdit_jax.evaluate.statistics import (
    OF_SINGLE_IMAGES,
    Statistics,
    check_count,
    check_reference,
    check_same_size,
)
from mpdit_jax.evaluate.stored_statistics import holds_statistics, load_statistics
from mpdit_jax.evaluate.subsets import SomeImages, random_subset
from mpdit_jax.io.npz import npz_names
from mpdit_jax.io.paths import expand

Compute: TypeAlias = Callable[[ImageSet, Sequence[str], Sequence[str], str], Statistics]
"""`compute_statistics` of one extractor, called with images, outputs, outputs to keep and the progress bar's label."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images or their statistics."""

    place: str  # a set of images, see `open_set`, or saved statistics; "" for the run's own data
    metrics: Sequence[str]
    find: FindDecode  # decodes stores of latents
    own: Callable[[], ImageSet]  # opens the run's own data; called only for an empty `place`
    prefix: str = "--"  # of flags or fields in messages, "--" or "config.eval."
    image_size: int = 0  # see `open_set`
    k: int = 3  # the neighbour of precision and recall
    mesh: Mesh | None = None  # this process's devices while a store is decoded; None for the ambient mesh

    def check(self, extractor: Extractor | None, shape: tuple[int, int, int]) -> None:
        """Check the reference without evaluating an image, before hours of sampling. Collective.

        `shape` is the samples' (H, W, C). Without an extractor, a classifier for such images is trained later.

        Raises:
            InputError, DataError: a reference that cannot be read, is too small, or does not fit samples or extractor.
            ProcessError: the processes find different references.
        """
        if self._metrics:
            stored, images = self._open(extractor, shape)
            assert_equal_across_processes(_identity(stored) | (portable(images.about) if images is not None else {}))

    def statistics(self, extractor: Extractor, shape: tuple[int, int, int], compute: Compute) -> Statistics:
        """Return the statistics after the checks of `check`; the Inception Score alone reads no images."""
        if not self._metrics:
            return Statistics(extractor.name, extractor.fingerprint, 0, {})
        stored, images = self._open(extractor, shape)
        assert_equal_across_processes(_identity(stored))
        verb = "features of the reference:"
        if images is None:
            assert stored is not None
            return stored
        if stored is None:
            return compute(images, needed(self._metrics), kept(self._metrics), verb)
        features = compute(images, ["pool"], ["pool"], verb).features
        return dataclasses.replace(stored, features=features, about={**stored.about, "images": images.about})

    @property
    def _metrics(self) -> list[str]:
        """Metrics that need real images."""
        return [name for name in self.metrics if name != "is"]

    def _open(
        self, extractor: Extractor | None, shape: tuple[int, int, int]
    ) -> tuple[Statistics | None, ImageSet | None]:
        """Open saved statistics, images, or both where one file holds both, as ADM's batches do."""
        single, where = bool(OF_SINGLE_IMAGES & set(self._metrics)), f"in {self._name}"
        path = Path() if not self.place or self.place.startswith(PREFIXES) else expand(self.place)
        if not (path.is_file() and holds_statistics(path, "classifier" if extractor is None else extractor.name)):
            images = self._open_images(shape[2] if extractor is None else extractor.channels)
            check_same_size(images.about, {"shape": shape})
            check_count(len(images), self._metrics, self.k, where)
            if (extractor is None or extractor.image_shape is not None) and images.shape[2] != shape[2]:
                raise InputError(
                    f"{self._name} has images of {images.shape[2]} channel(s) and the samples have {shape[2]}: "
                    "expected the same."
                )
            return None, images
        if extractor is None:
            raise InputError(
                f"{self._name} holds statistics, and this run trains its own classifier: give images, or the "
                "classifier:FILE of the statistics."
            )
        stored = load_statistics(path, extractor, prefix=self.prefix)
        check_same_size(stored.about, {"shape": shape})
        beside = open_npz(path) if single and stored.features is None and "arr_0" in npz_names(path) else None
        check_reference(stored, [name for name in self._metrics if beside is None or name not in OF_SINGLE_IMAGES])
        if single:
            check_count(len(stored.single("them") if beside is None else beside), self._metrics, self.k, where)
        return stored, beside

    def _open_images(self, channels: int) -> ImageSet:
        with nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            if self.place:
                return open_set(self.place, image_size=self.image_size, channels=channels, find=self.find)
            return self.own()

    @property
    def _name(self) -> str:
        return f"{self.prefix}reference={self.place}" if self.place else "the run's data"


def own_images(name: str, source: Source, data: FrozenConfigDict, find: FindDecode) -> ImageSet:
    """Open the images of a run's `config.data`, 50,000 at most; reports call them `name`."""
    about = {"data": data_identity(data)}
    if source.latents is not None:
        store = open_set(data.path, find=find)
        images: ImageSet = SomeImages(store, rows_of(source), {**store.about, "count": len(source), **about})
    else:
        images = SourceImages(source, about_source(name, source) | about)
    return random_subset(images, min(MOST_REAL, len(images)))


def _identity(stored: Statistics | None) -> dict[str, Any]:
    return {} if stored is None else {"reference": stored.file["sha256"]}
