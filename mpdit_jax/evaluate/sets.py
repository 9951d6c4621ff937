"""Image sets that evaluations open by name: an .npz, a folder, a store of latents, or a training data set."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpdit_jax.data.image_sets import ImageSet, open_folder
from mpdit_jax.data.info import identity
from mpdit_jax.data.latent_store import LABELS, MANIFEST, LatentStore
from mpdit_jax.data.sources import SOURCES, Source, load_source
from mpdit_jax.errors import DataError, InputError
from mpdit_jax.io import pictures
from mpdit_jax.io.json_files import digest_of
from mpdit_jax.io.npz import map_npz, npz_checksums, npz_names, read_npz
from mpdit_jax.io.paths import expand

Decode = Callable[[np.ndarray], np.ndarray]
"""Unscaled latents float32 (n, h, w, C) to images (n, H, W, 1 or 3) in [-1, 1]."""
FindDecode = Callable[[Path, str], tuple[Decode, dict[str, Any]]]
"""Maps a store and its VAE's fingerprint to a decoder and the settings that change images; raises InputError."""


@dataclasses.dataclass(frozen=True)
class ArrayImages:
    """An image set in memory, or mapped from a file."""

    images: np.ndarray  # uint8 (N, H, W, C)
    about: dict[str, Any]
    labels: np.ndarray | None = None  # int (N,), if the file has labels

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Copy the images of these rows."""
        return np.ascontiguousarray(self.images[indices])


@dataclasses.dataclass(frozen=True)
class SourceImages:
    """A training data set as an image set."""

    source: Any
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each image."""
        height, width, channels = self.source.shape
        return height, width, channels

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Read examples as uint8."""
        return pictures.to_uint8(self.source.batch(indices)["x"])


def open_set(place: str, *, image_size: int = 0, channels: int = 3, find: FindDecode | None = None) -> ImageSet:
    """Open the images that a command's argument names.

    Args:
        place: an .npz with `arr_0`, a folder of images (with subfolders or not), a store of latents, or
            `data:NAME[:SPLIT]` for a data set of `mpdit_jax.data`, such as data:fashion_mnist:test.
        image_size: crop a folder's images to central squares of this size; 0 leaves them as they are.
        channels: channels of a folder's images: 3 for RGB, 1 for grey.
        find: finds the decoder of a store of latents; None refuses stores.

    Raises:
        InputError, DataError: a missing set, or one of another form.
    """
    kind, colon, rest = place.partition(":")
    if colon and kind == "data":
        return _open_source(place, rest)
    path = expand(place)
    if path.is_file():
        return open_npz(path)
    if not path.is_dir():
        raise InputError(
            f"{place}: no such file or folder; expected an .npz, a folder of images or a store of latents."
        )
    if (path / MANIFEST).is_file():
        return _open_store(path, find)
    images = dataclasses.replace(open_folder(path), image_size=image_size, channels=channels)
    images.read(np.arange(1))  # a damaged picture is found early
    return images


def open_npz(path: Path) -> ArrayImages:
    """Open `arr_0` uint8 (N, H, W, 1 or 3) and `labels` of an .npz; images are mapped unless compressed.

    Raises:
        InputError: a missing array, another dtype or shape.
    """
    try:
        images = map_npz(path, "arr_0")
        labels = read_npz(path, ["labels"])[0] if "labels" in npz_names(path) else None
        contents = digest_of(npz_checksums(path))
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): expected an .npz with images as arr_0.") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise InputError(
            f"{path}: arr_0 is {images.dtype} {images.shape}; expected uint8 from 0 to 255, (N, height, width, "
            "1 or 3), as `python -m mpdit_jax.sample --out=samples.npz` writes it."
        )
    about = _about(path, len(images), images.shape[1:], [path], contents)
    if labels is None or labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        return ArrayImages(images, about)
    return ArrayImages(images, about | {"labels": count_labels(labels)}, labels)


def count_labels(labels: np.ndarray) -> dict[str, int]:
    """Count the classes among labels (n,), and the images of the rarest and the most frequent class."""
    counts = np.unique(labels, return_counts=True)[1]
    return {"classes": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}


def _open_source(place: str, rest: str) -> SourceImages:
    name, _, split = rest.partition(":")
    if name not in SOURCES:
        raise InputError(f"{place}: expected data:NAME[:SPLIT] with a name of {', '.join(SOURCES)}.")
    source = load_source(name, "", split or ("all" if name == "digits" else "train"))
    return SourceImages(source, about_source(place, source))


def about_source(place: str, source: Source) -> dict[str, Any]:
    """Return `ImageSet.about` of a training data set."""
    about = {"path": place, "count": len(source), "shape": list(source.shape)}
    return about | {"contents": f"{identity(source)['data']} {source.contents}"}


def _open_store(path: Path, find: FindDecode | None) -> SourceImages:
    """Open a store as the decoded means of its posteriors, not mirrored."""
    if find is None:
        raise InputError(f"{path} is a store of latents: expected images.")
    store = LatentStore(path)
    if not len(store):
        raise DataError(f"{path}: there are no examples.")
    (decode, settings), size = find(path, store.manifest.vae_fingerprint), store.manifest.image_size

    def read(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": np.asarray(decode(store.moments(rows)[0][:, 0].astype(np.float32)))}

    height, width, channels = read(np.arange(1))["x"].shape[1:]
    # Other files of `prepare` describe the machine and differ between copies.
    files = [path / name for name in (LABELS, *(shard.name for shard in store.manifest.shards))]
    about = _about(path, len(store), (size, size, channels), files, store.manifest.contents)
    about |= {"latents": "decoded means of the posteriors", "vae": store.manifest.vae_fingerprint, **settings}
    return SourceImages(Source(store.labels, store.manifest.class_names, (height, width, channels), read), about)


def _about(path: Path, count: int, shape: Sequence[int], files: Sequence[Path], contents: str) -> dict[str, Any]:
    """Return `ImageSet.about` of images in files; its `files` differs for a changed file or a copy."""
    known = [file.stat() for file in files]
    listing = [f"{file} {one.st_size} {one.st_mtime_ns}\n" for file, one in zip(files, known, strict=True)]
    return {
        "path": str(path),
        "count": count,
        "shape": list(shape),
        "bytes": sum(one.st_size for one in known),
        "files": hashlib.sha256("".join(listing).encode()).hexdigest()[:16],
        "contents": contents,
    }
