"""The protocol of image sets, and the pictures of a folder, of IDX files or of TensorFlow Datasets."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mpdit_jax.data.crop import to_mode, to_square
from mpdit_jax.data.picture_files import find_labelled_pictures, find_pictures
from mpdit_jax.errors import DataError, MissingExtraError, first_line, install_extra
from mpdit_jax.io.idx import read_idx_pair
from mpdit_jax.io.pictures import SUFFIXES, open_picture


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
        """The images at `indices` (n,): uint8 (n, H, W, C)."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """An image set of encoded pictures, decoded and cropped on reading."""

    place: str  # the name a user gave
    keys: Sequence[str]  # names of the pictures at their source
    class_names: tuple[str, ...]  # in label order; empty without classes
    labels: np.ndarray | None  # int32 (N,); None where each picture's own record holds it
    open: Callable[[int], tuple[Image.Image, int]]  # a picture and its label; raises anything for a broken one
    identify: Callable[[], dict[str, Any]]  # see `ImageSet.about`; its "contents" are equal for a copy elsewhere
    image_size: int = 0  # pixels a side of the central square that is cut; 0 for whole pictures of one size
    channels: int = 3  # 3 for RGB, 1 for grey

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
                    "(height, width): expected one size, as samples have; of photographs that are a reference, give "
                    "--image_size=PIXELS to cut squares of one size, as the reference batches of ImageNet were."
                )
        return np.stack(found)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images at `indices` (n,) to train on: `x` float32 (n, H, W, C) in [-1, 1]."""
        return {"x": self.read(indices).astype(np.float32) / 127.5 - 1}

    def _decode_or_name(self, index: int) -> np.ndarray:
        try:
            return self.decode(index)[0]
        except Exception as error:  # what a broken file raises is up to its decoder, TypeError for some TIFF files
            name = f"{self.place}/{self.keys[index]}"
            raise DataError(f"{name} cannot be used ({error}): repair or remove it.") from error


def open_images(images: str, split: str = "train", *, classes: bool = True) -> Pictures:
    """Open what `--images` names: a folder, `idx:FOLDER`, or `tfds:NAME`; the latter two have splits.

    Without `classes`, labels are not needed, and a folder's images may lie anywhere in it.

    Raises:
        DataError: nothing there, or not of that form.
        MissingExtraError: tfds without the extra [tfds].
    """
    kind, colon, rest = images.partition(":")
    opener = _OPENERS.get(kind) if colon else None
    found = open_folder(Path(images), classes=classes) if opener is None else opener(rest, split)
    if not len(found):
        raise DataError(f"--images={images}: there are no images.")
    return found


def open_folder(root: Path, *, classes: bool = False) -> Pictures:
    """Open the pictures below a folder; with `classes`, each subfolder is a class.

    Raises:
        DataError: no such folder, or no pictures.
    """
    keys, labels, names = find_labelled_pictures(root) if classes else (find_pictures(root), [], [])
    if not keys:
        raise DataError(f"{root}: no images; expected names that end in {', '.join(SUFFIXES)}.")
    known = np.array(labels or [0] * len(keys), np.int32)

    def read(index: int) -> tuple[Image.Image, int]:
        return open_picture((root / keys[index]).read_bytes()), int(known[index])

    @cache
    def identify() -> dict[str, Any]:
        files, sizes = hashlib.sha256(), []
        for key in keys:
            size, changed = _size_and_time(root / key)
            files.update(f"{root / key} {size} {changed}\n".encode(errors="surrogateescape"))
            sizes.append(size)
        contents = f"{_digest(keys, known)} {hashlib.sha256(np.array(sizes, '<i8').tobytes()).hexdigest()[:16]}"
        # `files` differs for a copy elsewhere: whole paths, sizes and times of change.
        return {"bytes": sum(sizes), "files": files.hexdigest()[:16], "contents": contents}

    return Pictures(str(root), keys, tuple(names), known if classes else None, read, identify)


def _open_idx(path: str, split: str) -> Pictures:
    try:
        images, labels, name = read_idx_pair(Path(path), split)
    except FileNotFoundError as error:
        raise DataError(f"--images=idx:{path}: expected {error} there.") from error
    labels, names = labels.astype(np.int32), tuple(str(label) for label in range(int(labels.max(initial=0)) + 1))
    keys = [f"{name}/{index}" for index in range(len(labels))]

    def read(index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(images[index]), int(labels[index])

    @cache
    def identify() -> dict[str, Any]:
        return {"contents": f"{_digest(keys, labels)} {hashlib.sha256(images.tobytes()).hexdigest()[:16]}"}

    return Pictures(f"idx:{path}", keys, names, labels, read, identify)


def _open_tfds(name: str, split: str) -> Pictures:
    """A data set that TFDS has prepared as array_record files, such as imagenet2012."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise MissingExtraError(
            f"--images=tfds:{name} needs TensorFlow Datasets: {install_extra('tfds')}, or give a folder of images."
        ) from error
    try:
        builder = tfds.builder(name)
        features = builder.info.features
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        class_names = tuple(features["label"].names)
        contents = f"{builder.info.full_name} {split} {len(source)}"
    except Exception as error:  # what TFDS raises is up to the data set
        raise DataError(
            f"--images=tfds:{name} (split {split}) cannot be opened ({first_line(error)[:300]}): expected a data set "
            "with `image` and `label`, prepared by `tfds build --file_format=array_record` (which needs TensorFlow)."
        ) from error

    def read(index: int) -> tuple[Image.Image, int]:
        record = source[index]
        return open_picture(record["image"]), int(record["label"])

    keys = [f"{split}/{index}" for index in range(len(source))]
    return Pictures(f"tfds:{name}", keys, class_names, None, read, lambda: {"contents": contents})


_OPENERS: dict[str, Callable[[str, str], Pictures]] = {"idx": _open_idx, "tfds": _open_tfds}


def key_bytes_of(key: str) -> bytes:
    """A key as a store holds it: UTF-8, or the file system's own bytes of a name that is not."""
    return key.encode("utf-8", "surrogateescape")


def _digest(keys: Sequence[str], labels: np.ndarray) -> str:
    content = hashlib.sha256(key_bytes_of("\0".join(keys)))
    content.update(labels.astype("<i4").tobytes())
    return content.hexdigest()[:16]


def _size_and_time(path: Path) -> tuple[int, int]:
    """Bytes and time of change of a file; -1 for a link whose target is gone."""
    try:
        known = path.stat()
    except OSError:
        return -1, -1
    return known.st_size, known.st_mtime_ns
