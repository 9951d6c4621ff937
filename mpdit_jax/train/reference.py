"""What samples are compared with while a run trains: saved statistics, images, or the run's own data."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from mpdit_jax.config.base import data_identity
from mpdit_jax.config.evaluation import MOST_REAL, fewest_images
from mpdit_jax.data.sources import Source
from mpdit_jax.distributed.collectives import any_process, run_on_process_0
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.evaluate.agreement import agree, name_of_first, portable
from mpdit_jax.evaluate.compute import kept, needed
from mpdit_jax.evaluate.decoding import find_decode
from mpdit_jax.evaluate.extractors import Extractor
from mpdit_jax.evaluate.sets import ImageBlocks, SourceImages, open_npz, open_set
from mpdit_jax.evaluate.statistics import (
    OF_SINGLE_IMAGES,
    Statistics,
    check_reference,
    check_same_size,
    holds_statistics,
    load_statistics,
    nothing_seen,
    save_statistics,
)
from mpdit_jax.evaluate.subsets import limited
from mpdit_jax.io.files import digest_of, expand
from mpdit_jax.io.npz import npz_names
from mpdit_jax.sample.decoding import Decode
from mpdit_jax.train.partial_statistics import PartialStatistics, partial_statistics


class Reference:
    """The real images of `config.eval`. They are looked at once; what was seen is kept beside the run."""

    def __init__(
        self,
        config: FrozenConfigDict,
        folder: Path,
        source: Source,
        decode: Decode | None,
        metrics: Sequence[str],
        stopped: Callable[[], bool],
    ) -> None:
        """Nothing is read yet; see `check`.

        Args:
            config: of the run, resolved.
            folder: where the statistics are kept.
            source: the run's data.
            decode: from latents to images, for a run on latents.
            metrics: by our names.
            stopped: whether this process was asked to stop.
        """
        self._config, self._folder = config, folder
        place = config.eval.reference
        self._place = place if not place or place.startswith("data:") else str(expand(place))
        extractor = config.eval.features.partition(":")[0]
        self._is_statistics = bool(place) and holds_statistics(Path(self._place), extractor)
        self._own, self._stopped = _Decoded(source, decode), stopped
        self._real = [name for name in metrics if name != "is"]  # what compares with them
        self._keep = kept(self._real)
        self._fewest = fewest_images(self._real)

    def check(self, extractor: Extractor | None) -> dict[str, Any]:
        """Find out before hours of training what cannot be compared with.

        Args:
            extractor: None where it is made later.

        Returns:
            What all processes must have alike of it.

        Raises:
            ConfigError: too few images, images of another size than the samples, or a classifier of another size or of
            another run.
            InputError, DataError: a reference that cannot be read, or is of another extractor.
        """
        shape, features = self._own.shape, self._config.eval.features
        facts = self._check_real(extractor, shape) if self._real else {}
        if extractor is not None and extractor.image_shape not in (None, shape):
            raise ConfigError(
                f"config.eval.features={features} was trained on images {extractor.image_shape} "
                f"(height, width, channels) and this run draws {shape}: train one on images of that size."
            )
        if shape[2] not in (1, 3):
            raise ConfigError(
                f"config.eval.every={self._config.eval.every}: this run draws images of {shape[2]} channels, and "
                f"{features} looks at those of 1 or 3; set config.eval.every=0."
            )
        return facts

    def _check_real(self, extractor: Extractor | None, shape: tuple[int, int, int]) -> dict[str, Any]:
        place, classifier = self._place, self._config.eval.features == "classifier"
        name = f"config.eval.reference={place}"
        if not place:
            self._check_count(len(self._own), "the run's data")
            return {"contents": self._own.contents}
        elif self._is_statistics and classifier:
            raise ConfigError(
                f"{name} holds statistics, and config.eval.features='classifier' is trained by "
                "this run alone: give images, or the classifier:FILE that they are of."
            )
        elif self._is_statistics:
            if extractor is not None:
                stored = self._load(extractor)
                check_same_size(stored.about, {"shape": shape})
                if self._keep:
                    alone = stored.features is None
                    self._check_count(len(open_npz(Path(place)) if alone else stored.single("them")), name)
                return {"config.eval.reference": stored.file["sha256"]}
        else:
            images = self._open(shape[2] if extractor is None else extractor.channels)
            self._check_count(len(images), name)
            whole = classifier or (extractor is not None and extractor.image_shape is not None)
            compared = slice(3 if whole else 2)
            if images.shape[compared] != shape[compared]:
                raise ConfigError(
                    f"{name} has images of {images.shape[compared]} (height, width"
                    f"{', channels' * whole}) and this run draws {shape[compared]}: expected the same size."
                )
            return portable(images.about)
        return {}

    def statistics(self, extractor: Extractor, mesh: jax.sharding.Mesh) -> Statistics | None:
        """Of the reference under an extractor, on every process; None if one of them was asked to stop meanwhile.

        Args:
            extractor: the network.
            mesh: of this process's devices.

        Raises:
            InputError, DataError: a reference that cannot be read.
            ProcessError: the processes find images that differ.
        """
        if not self._real:
            return nothing_seen(extractor)
        if self._is_statistics:
            stored = self._load(extractor)
            if not self._images_are_in_it(stored):
                return stored
            seen = self._look(extractor, mesh, open_npz(Path(self._place)))
            return None if seen is None else dataclasses.replace(stored, features=seen.features)
        with jax.set_mesh(mesh):
            images: ImageBlocks = self._open(extractor.channels) if self._place else self._own_images()
        return self._look(extractor, mesh, images)

    def _look(self, extractor: Extractor, mesh: jax.sharding.Mesh, images: ImageBlocks) -> Statistics | None:
        # Named after everything that decides what is seen: of another classifier or data set there is another file.
        decides = [extractor.fingerprint, images.about, needed(self._real), bool(self._keep)]
        agree(portable(images.about))
        path = self._folder / f"real_{name_of_first(digest_of(decides))}.npz"
        earlier = _read(path, extractor)
        # Decided together, before the first process can write what the others look for.
        if not any_process(earlier is None) and earlier is not None:
            return earlier
        seen = PartialStatistics(extractor, self._real)
        # The extractor may split these again: to merge the moments of every few images would take as long as to look.
        width = max(extractor.batch_size, self._config.eval.batch_size)
        for rows in partial_statistics(len(images), width, "looking at real images:", "images", self._stopped):
            if rows is None:
                return None
            if len(rows):
                with jax.set_mesh(mesh):
                    seen.add(images.read(rows), rows)
        found = seen.together(images.about)
        if found is None:
            raise InputError(f"{images.about['path']}: expected two images or more to compare with.")
        run_on_process_0(lambda: self._save(path, found))
        return found

    def _load(self, extractor: Extractor) -> Statistics:
        stored = load_statistics(self._place, extractor, setting="config.eval.preprocessing")
        alone = self._images_are_in_it(stored)  # these metrics then look at the images
        check_reference(stored, [name for name in self._real if not (alone and name in OF_SINGLE_IMAGES)])
        return stored

    def _images_are_in_it(self, stored: Statistics) -> bool:
        """Whether single images are needed that are in the file beside the moments, as in ADM's batches."""
        return bool(self._keep) and stored.features is None and "arr_0" in npz_names(self._place)

    def _open(self, channels: int) -> ImageBlocks:
        # A store is decoded by the VAE of the run: loaded anew, and let go of with what it decodes.
        find = find_decode(self._config.sample.vae, name="config.sample.vae")
        return open_set(self._place, channels=channels, find=find)

    def _own_images(self) -> ImageBlocks:
        """As `evaluate` chooses them."""
        about = {"path": "the data of the run", "most": MOST_REAL, "data": data_identity(self._config.data)}
        about |= {"contents": self._own.contents}  # a run may go on with other examples of the same labels
        return limited(SourceImages(self._own, about), min(MOST_REAL, len(self._own)))

    def _check_count(self, count: int, name: str) -> None:
        if count < self._fewest:
            raise ConfigError(
                f"{name} has {count} image(s), and config.eval.metrics={self._config.eval.metrics} need {self._fewest} "
                "or more."
            )

    def _save(self, path: Path, found: Statistics) -> None:
        save_statistics(path, found, features=bool(self._keep))
        for other in self._folder.glob(f"real_{'?' * 16}.npz"):
            if other != path:
                other.unlink()  # ours, of what was compared with before


def _read(path: Path, extractor: Extractor) -> Statistics | None:
    """What was kept, as if it had just been seen; None where there is nothing, or damaged, for it can be made again."""
    try:
        return dataclasses.replace(load_statistics(path, extractor), file={}) if path.is_file() else None
    except InputError:
        return None


class _Decoded:
    """A source whose examples are images: its own, or what the VAE makes of its latents' means."""

    def __init__(self, source: Source, decode: Decode | None) -> None:
        self._source, self._decode = source, decode
        self.class_names, self.labels, self.latents = source.class_names, source.labels, None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each; of latents by decoding one."""
        if self._source.latents is None:
            return self._source.shape
        height, width, channels = self.batch(np.arange(1))["x"].shape[1:]
        return height, width, channels

    @property
    def contents(self) -> str:
        """Those of the source."""
        return self._source.contents

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """`x` float32 (n, H, W, C) in [-1, 1] of the examples at `indices`."""
        batch, space = self._source.batch(indices), self._source.latents
        if space is None or self._decode is None:
            return {"x": batch["x"]}
        mean, std = np.array(space.mean, np.float32), np.array(space.std, np.float32)
        latents = (batch["mean"][:, 0].astype(np.float32) - mean) / std  # (n, h, w, C)
        return {"x": np.clip(np.asarray(self._decode(jax.numpy.asarray(latents))), -1, 1)}
