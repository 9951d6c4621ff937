"""The protocol of image sets, and the one grammar of the names by which every command opens them.

FOLDER              pictures; for labels, one subfolder makes one class
FILE.npz            `arr_0` (as samples) or `images` (as training data), and `labels`
idx:FOLDER[:SPLIT]  IDX files, as MNIST's
tfds:NAME[:SPLIT]   what TensorFlow Datasets has prepared
data:NAME[:SPLIT]   a training data set that needs no path, such as data:digits
STORE               a folder of latents, where something decodes them
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpdit_jax.data.info import identity
from mpdit_jax.data.latent_store import LABELS, MANIFEST, LatentStore
from mpdit_jax.data.picture_sets import Pictures, from_arrays, open_folder, open_idx, open_tfds
from mpdit_jax.data.sources import SOURCES, Source, load_source
from mpdit_jax.errors import DataError, InputError
from mpdit_jax.io import pictures
from mpdit_jax.io.json_files import digest_of
from mpdit_jax.io.npz import map_npz, npz_checksums, npz_names, read_npz
from mpdit_jax.io.paths import expand
from mpdit_jax.validation import layout_remedy

PREFIXES = ("data:", "idx:", "tfds:")
_FORMS = "a FOLDER of images, a FILE.npz, idx:FOLDER[:SPLIT], tfds:NAME[:SPLIT] or data:NAME[:SPLIT]"
_SPLIT = re.compile(r":([A-Za-z]\w*(\[[^]]*\])?)$")  # begins with a letter, unlike a version (tfds:imagenet2012:5.1.0)
_DATA_SETS = tuple(name for name in SOURCES if name != "arrays")  # those that need no path

DecodeStored = Callable[[np.ndarray], np.ndarray]
"""Maps a store's unscaled latents float32 (n, h, w, C) to images (n, H, W, 1 or 3) in [-1, 1]."""
FindDecode = Callable[[Path, str], tuple[DecodeStored, dict[str, Any]]]
"""Maps a store and its VAE's fingerprint to a decoder and the settings that change images; raises InputError."""


class ImageSet(Protocol):
    """Images of one shape that can be read at any index."""

    @property
    def about(self) -> dict[str, Any]:
        """What identifies the set, as JSON values; another set, or a changed one, has other values."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each image."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices` (n,): uint8 (n, H, W, C)."""


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

    source: Source
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each image."""
        return self.source.shape

    @property
    def labels(self) -> np.ndarray:
        """Whole numbers (N,)."""
        return self.source.labels

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Read examples as uint8."""
        return pictures.to_uint8(self.source.batch(indices)["x"])


def open_set(place: str, *, image_size: int = 0, channels: int = 3, find: FindDecode | None = None) -> ImageSet:
    """Open a set of any form that this module's docstring lists, to look at its images.

    Args:
        place: the name of the set.
        image_size: cut pictures to central squares of this size; 0 leaves them as they are. Arrays stay whole.
        channels: channels of pictures: 3 for RGB, 1 for grey.
        find: finds the decoder of a store of latents; None refuses stores.

    Raises:
        InputError, DataError: a missing set, or one of another form.
        MissingExtraError: tfds without the extra [tfds].
    """
    kind, name, split = _parse(place)
    if kind == "store":
        return _open_store(Path(name), find)
    if kind in ("npz", "data"):
        return _open_arrays(kind, name, split)
    images = dataclasses.replace(_open_pictures(kind, name, split), image_size=image_size, channels=channels)
    images.read(np.arange(1))  # a damaged picture is found early
    return images


def open_images(
    place: str, split: str = "", *, classes: bool = True, rejected: Mapping[str, int] | None = None
) -> Pictures:
    """Open a set of any form but a store, to encode its images or to train on them.

    Args:
        place: the name of the set, see this module's docstring.
        split: of idx:, tfds: and data:, if the name has none; default "train", and "all" of data:digits.
        classes: whether labels are needed. If not, images may lie anywhere below the folder.
        rejected: see `open_folder`.

    Raises:
        DataError: nothing there, not of that form, or no labels.
        MissingExtraError: tfds without the extra [tfds].
    """
    kind, name, split = _parse(place, split)
    if kind == "store":
        raise DataError(f"{place} is a store of latents: give the images it was made of, {_FORMS}.")
    if kind in ("npz", "data"):
        array = _open_arrays(kind, name, split)
        if array.labels is None and classes:
            raise DataError(f"{place}: no labels; expected an array `labels` of whole numbers from 0 on, one an image.")
        labels = np.zeros(len(array), np.int32) if array.labels is None else array.labels
        found = from_arrays(array.about, "image", labels, lambda index: array.read(np.array([index]))[0])
    else:
        found = _open_pictures(kind, name, split, classes=classes, rejected=rejected)
    if not len(found):
        raise DataError(f"{place}: there are no images.")
    return found


def _parse(place: str, split: str = "") -> tuple[str, str, str]:
    """Return kind, name and split of a set; the kind is "data", "idx", "tfds", "npz", "store" or "folder"."""
    kind, colon, name = place.partition(":")
    if kind + colon in PREFIXES:
        if found := _SPLIT.search(name):
            name, split = name[: found.start()], found[1]
        if kind == "data" and name not in _DATA_SETS:
            raise DataError(f"{place}: expected data:NAME[:SPLIT] with a name of {', '.join(_DATA_SETS)}.")
        return kind, name, split or ("all" if (kind, name) == ("data", "digits") else "train")
    path = expand(place)
    if path.is_file():
        return "npz", str(path), ""
    if not path.is_dir():
        raise DataError(f"{place}: no such file or folder; expected {_FORMS}.")
    return "store" if (path / MANIFEST).is_file() else "folder", str(path), ""


def _open_arrays(kind: str, name: str, split: str) -> ArrayImages | SourceImages:
    if kind == "npz":
        return open_npz(Path(name))
    source = load_source(name, "", split)
    return SourceImages(source, about_source(f"data:{name}:{split}", source))


def _open_pictures(kind: str, name: str, split: str, **folder: Any) -> Pictures:
    if kind == "tfds":
        return open_tfds(name, split)
    return open_idx(expand(name), split) if kind == "idx" else open_folder(Path(name), **folder)


def open_npz(path: Path) -> ArrayImages:
    """Open `arr_0` or `images`, uint8 (N, H, W, 1 or 3), and `labels` of an .npz; images are mapped unless compressed.

    Raises:
        InputError: a missing array, another dtype or shape.
    """
    try:
        names, checksums = npz_names(path), npz_checksums(path)
        array = "images" if "images" in names and "arr_0" not in names else "arr_0"
        images = map_npz(path, array)
        labels = read_npz(path, ["labels"])[0] if "labels" in names else None
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): expected an .npz with images as arr_0.") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise InputError(
            f"{path}: {array} is {images.dtype} {images.shape}; expected uint8 from 0 to 255, (N, height, width, "
            f"1 or 3), as `python -m mpdit_jax.sample --out=samples.npz` writes it{layout_remedy(images.shape, array)}."
        )
    about = _about(path, len(images), images.shape[1:], [path], digest_of(checksums))
    if labels is None or labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        return ArrayImages(images, about)
    return ArrayImages(images, about | {"labels": count_labels(labels)}, labels)


def count_labels(labels: np.ndarray) -> dict[str, int]:
    """Count the classes among labels (n,), and the images of the rarest and the most frequent class."""
    counts = np.unique(labels, return_counts=True)[1]
    return {"classes": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}


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
