"""Labelled pictures of a folder, of IDX files, of TensorFlow Datasets or in memory, decoded and cropped on reading."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mpdit_jax.data.crop import to_mode, to_square
from mpdit_jax.data.picture_files import find_labelled_pictures, find_pictures
from mpdit_jax.data.sources import number_names
from mpdit_jax.errors import DataError, MissingExtraError, first_line, install_extra
from mpdit_jax.io.idx import read_idx_pair
from mpdit_jax.io.pictures import SUFFIXES, open_picture, to_pil


@dataclasses.dataclass(frozen=True)
class Pictures:
    """An image set (see `ImageSet`) of pictures of any size that are decoded and cropped on reading."""

    place: str  # the name of the set
    keys: Sequence[str]  # names of the pictures at their source
    class_names: tuple[str, ...]  # in label order; empty without classes
    labels: np.ndarray | None  # int32 (N,); None if labels are read together with the pictures
    open: Callable[[int], tuple[Image.Image, int]]  # a picture and its label; raises anything for a broken one
    identify: Callable[[], dict[str, Any]]  # see `ImageSet.about`; its "contents" are equal for a copy elsewhere
    image_size: int = 0  # pixels a side of the central square that is cut; 0 for whole pictures of one size
    channels: int = 3  # 3 for RGB, 1 for grey
    removed: frozenset[str] = frozenset()  # keys of rejected pictures (see `open_folder`) whose file is gone
    repaired: frozenset[str] = frozenset()  # keys of rejected pictures whose file size has changed since

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def identity(self) -> str:
        """A digest of names, labels and sizes or pixels; copies of the same files have the same."""
        return str(self.identify()["contents"])

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C), by decoding the first picture if all are taken whole."""
        if self.image_size:
            return self.image_size, self.image_size, self.channels
        height, width, channels = self._decode_or_name(0).shape
        return height, width, channels

    @cached_property
    def about(self) -> dict[str, Any]:
        """See `ImageSet.about`."""
        crop = f"central square, {self.image_size}" if self.image_size else "none"
        known = {"path": self.place, "count": len(self), "shape": list(self.shape)}
        return known | self.identify() | {"crop": crop}

    def decode(self, index: int) -> tuple[np.ndarray, int]:
        """Decode one picture, uint8 (H, W, C), with its label; raises anything for a broken one."""
        image, label = self.open(index)
        with image:
            if self.image_size:
                return to_square(image, self.image_size, self.channels), label
            array = np.asarray(to_mode(image, self.channels), np.uint8)
            return array.reshape(*array.shape[:2], self.channels), label

    def read(self, indices: np.ndarray) -> np.ndarray:
        """See `ImageSet.read`; raises DataError that names a broken picture, or one of another size."""
        found = [self._decode_or_name(int(index)) for index in indices]
        for index, array in zip(indices, found, strict=True):
            if array.shape != self.shape:
                raise DataError(
                    f"{self.place}/{self.keys[index]} is {array.shape[:2]} and {self.keys[0]} is {self.shape[:2]} "
                    "(height, width): expected one size, as samples have; for photographs that are a reference, give "
                    "--image_size=PIXELS to cut squares of one size, as the reference batches of ImageNet were."
                )
        return np.stack(found)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the images at `indices` (n,) to train on: `x` float32 (n, H, W, C) in [-1, 1]."""
        return {"x": self.read(indices).astype(np.float32) / 127.5 - 1}

    def _decode_or_name(self, index: int) -> np.ndarray:
        try:
            return self.decode(index)[0]
        except Exception as error:  # what a broken file raises is up to its decoder, TypeError for some TIFF files
            name = f"{self.place}/{self.keys[index]}"
            raise DataError(f"{name} cannot be used ({error}): repair or remove it.") from error


def open_folder(root: Path, *, classes: bool = False, rejected: Mapping[str, int] | None = None) -> Pictures:
    """Open the pictures below a folder; with `classes`, each subfolder is a class.

    `rejected` maps pictures that an earlier start could not use to their file sizes then. They keep their indices, and
    the set's identity uses these sizes, so that it stays the same when a user removes or repairs them.

    Raises:
        DataError: no such folder, or no pictures.
    """
    known = rejected or {}
    keys, labels, names = find_labelled_pictures(root, known) if classes else (find_pictures(root, known), [], [])
    now = file_sizes(root, known)
    removed = frozenset(key for key, size in now.items() if size < 0)
    if len(keys) == len(removed):
        raise DataError(f"{root}: there are no images; expected names that end in {', '.join(SUFFIXES)}.")
    numbers = np.array(labels or [0] * len(keys), np.int32)

    def read(index: int) -> tuple[Image.Image, int]:
        return open_picture((root / keys[index]).read_bytes()), int(numbers[index])

    @cache
    def identify() -> dict[str, Any]:
        files, sizes = hashlib.sha256(), []
        for key in keys:
            size, changed = _size_and_time(root / key)
            files.update(f"{root / key} {size} {changed}\n".encode(errors="surrogateescape"))
            sizes.append(known.get(key, size))
        contents = f"{_digest(keys, numbers)} {hashlib.sha256(np.array(sizes, '<i8').tobytes()).hexdigest()[:16]}"
        # `files` differs for a copy elsewhere: whole paths, sizes and times of change.
        return {"bytes": sum(sizes), "files": files.hexdigest()[:16], "contents": contents}

    repaired = frozenset(key for key, size in now.items() if size != known[key]) - removed
    numbered = numbers if classes else None
    return Pictures(str(root), keys, tuple(names), numbered, read, identify, removed=removed, repaired=repaired)


def file_sizes(root: Path, keys: Iterable[str]) -> dict[str, int]:
    """Return the bytes of files below a folder, by name; -1 for one that is not there."""
    return {key: _size_and_time(root / key)[0] for key in keys}


def from_arrays(about: Mapping[str, Any], stem: str, labels: np.ndarray, read: Callable[[int], np.ndarray]) -> Pictures:
    """Make pictures STEM/NUMBER of arrays: `read` gives one as uint8 (H, W, 1 or 3).

    `about` has the "path" of the set and a digest of its "contents". Classes are called by their numbers.
    """
    names = number_names(labels, about["path"])
    numbers, keys = labels.astype(np.int32), [f"{stem}/{index}" for index in range(len(labels))]
    known = {"contents": f"{_digest(keys, numbers)} {about['contents']}"}

    def open_one(index: int) -> tuple[Image.Image, int]:
        return to_pil(read(index)), int(numbers[index])

    return Pictures(about["path"], keys, names, numbers, open_one, lambda: known)


def open_idx(folder: Path, split: str) -> Pictures:
    """Open the pictures of a pair of IDX files; raises DataError if they are missing or damaged."""
    place = f"idx:{folder}:{split}"
    try:
        images, labels, name = read_idx_pair(folder, split)
    except FileNotFoundError as error:
        raise DataError(f"{place}: expected {error} in {folder}.") from error
    about = {"path": place, "contents": hashlib.sha256(images.tobytes()).hexdigest()[:16]}
    return from_arrays(about, name, labels, lambda index: images[index, :, :, None])


def open_tfds(name: str, split: str) -> Pictures:
    """Open a data set that TFDS has prepared as array_record files, such as imagenet2012.

    Raises:
        DataError: no such data set or split, or files of another format.
        MissingExtraError: the extra [tfds] is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise MissingExtraError(
            f"tfds:{name} needs TensorFlow Datasets: {install_extra('tfds')}, or give a folder of images."
        ) from error
    place = f"tfds:{name}:{split}"
    try:
        builder = tfds.builder(name)
        features = builder.info.features
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        class_names = tuple(features["label"].names)
        contents = f"{builder.info.full_name} {split} {len(source)}"
    except Exception as error:  # what TFDS raises is up to the data set
        raise DataError(
            f"{place} cannot be opened ({first_line(error)[:300]}): expected a data set with `image` and `label`, "
            "prepared by `tfds build --file_format=array_record` (which needs TensorFlow)."
        ) from error

    def read(index: int) -> tuple[Image.Image, int]:
        record = source[index]
        return open_picture(record["image"]), int(record["label"])

    keys = [f"{split}/{index}" for index in range(len(source))]
    return Pictures(place, keys, class_names, None, read, lambda: {"contents": contents})


def key_bytes_of(key: str) -> bytes:
    """Return a key as a store holds it: UTF-8, or the file system's own bytes of a name that is not."""
    return key.encode("utf-8", "surrogateescape")


def _digest(keys: Sequence[str], labels: np.ndarray) -> str:
    content = hashlib.sha256(key_bytes_of("\0".join(keys)))
    content.update(labels.astype("<i4").tobytes())
    return content.hexdigest()[:16]


def _size_and_time(path: Path) -> tuple[int, int]:
    """Return the bytes and time of change of a file; -1 for a link whose target is gone."""
    try:
        known = path.stat()
    except OSError:
        return -1, -1
    return known.st_size, known.st_mtime_ns
