"""Where images come from: folders, IDX files, TensorFlow Datasets; each a random-access `ImageSet`."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mpdit_jax.errors import DataError, MissingExtraError, install_extra
from mpdit_jax.io.idx import read_idx
from mpdit_jax.io.pictures import open_picture

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class ImageSet(Protocol):
    """Labelled images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One a class, in label order."""

    @property
    def keys(self) -> Sequence[str]:
        """What each image is called at its source, (N,)."""

    @property
    def identity(self) -> str:
        """Differs where another set would give other latents or labels."""

    def open(self, index: int) -> tuple[Image.Image, int]:
        """An image and its label; anything may be raised for a broken one."""


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """ROOT/CLASS/…/IMAGE: classes are the sorted names of the subfolders."""

    root: Path
    class_names: tuple[str, ...]
    labels: np.ndarray
    keys: tuple[str, ...]

    @cached_property
    def identity(self) -> str:
        """Of names, labels and sizes in bytes. Times would differ between copies of the same files."""
        sizes = np.array([_size(self.root / key) for key in self.keys], "<i8")
        return f"{_digest(self.keys, self.labels)} {hashlib.sha256(sizes.tobytes()).hexdigest()[:16]}"

    def open(self, index: int) -> tuple[Image.Image, int]:
        """Read the file."""
        return open_picture((self.root / self.keys[index]).read_bytes()), int(self.labels[index])


@dataclasses.dataclass(frozen=True)
class ImageArrays:
    """Images in memory."""

    images: np.ndarray  # uint8 (N, H, W)
    labels: np.ndarray
    class_names: tuple[str, ...]
    keys: tuple[str, ...]

    @cached_property
    def identity(self) -> str:
        """Of names, labels and pixels."""
        return f"{_digest(self.keys, self.labels)} {hashlib.sha256(self.images.tobytes()).hexdigest()[:16]}"

    def open(self, index: int) -> tuple[Image.Image, int]:
        """Take the row."""
        return Image.fromarray(self.images[index]), int(self.labels[index])


@dataclasses.dataclass(frozen=True)
class RandomAccess:
    """A TFDS data source of undecoded images; labels are known when a record is read."""

    source: Any
    class_names: tuple[str, ...]
    keys: tuple[str, ...]
    identity: str

    def open(self, index: int) -> tuple[Image.Image, int]:
        """Read the record."""
        record = self.source[index]
        return open_picture(record["image"]), int(record["label"])


def open_images(images: str, split: str = "train") -> ImageSet:
    """What `--images` names: a folder, `idx:FOLDER`, or `tfds:NAME`.

    Raises:
        DataError: nothing there, or not of that form.
        MissingExtraError: tfds without the extra [tfds].
    """
    kind, colon, rest = images.partition(":")
    opener = _OPENERS.get(kind) if colon else None
    found = open_folder(Path(images)) if opener is None else opener(rest, split)
    if not len(found.keys):
        raise DataError(f"--images={images}: there are no images.")
    return found


def open_folder(root: Path) -> ImageFolder:
    """A folder with one subfolder a class, as torchvision's ImageFolder reads it.

    Raises:
        DataError: no such folder, or no subfolders with images.
    """
    if not root.is_dir():
        raise DataError(f"--images={root}: no such folder; expected one with a subfolder for each class.")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [_files(root, name) for name in names]
    if not any(files):
        raise DataError(
            f"--images={root}: no images in subfolders; expected {root}/CLASS/IMAGE with names that end in "
            f"{', '.join(_SUFFIXES)}."
        )
    labels = np.repeat(np.arange(len(names), dtype=np.int32), [len(keys) for keys in files])
    return ImageFolder(root, tuple(names), labels, tuple(key for keys in files for key in keys))


def open_idx(path: str, split: str) -> ImageArrays:
    """`SPLIT-images-idx3-ubyte` and `SPLIT-labels-idx1-ubyte`, gzipped or not; the split "test" is also called t10k.

    Raises:
        DataError: files missing, damaged, or not of the same length.
    """
    folder = Path(path)
    stems = (split, "t10k") if split == "test" else (split,)
    found = [_idx_pair(folder, stem) for stem in stems]
    pair = next((files for files in found if files), None)
    if pair is None:
        raise DataError(
            f"--images=idx:{path}: expected {split}-images-idx3-ubyte and {split}-labels-idx1-ubyte there, or the same "
            "with .gz."
        )
    images, labels = read_idx(pair[0]), read_idx(pair[1])
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(f"{folder}: images {images.shape}, labels {labels.shape}; expected (N, H, W) and (N,).")
    names = tuple(str(label) for label in range(int(labels.max(initial=0)) + 1))
    keys = tuple(f"{pair[0].name}/{index}" for index in range(len(labels)))
    return ImageArrays(images, labels.astype(np.int32), names, keys)


def open_tfds(name: str, split: str) -> RandomAccess:
    """A data set that TFDS has prepared as array_record files, such as imagenet2012.

    Raises:
        MissingExtraError: TFDS is not installed.
        DataError: TFDS cannot open it this way, or it has no `image` and `label`.
    """
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
        identity = f"{builder.info.full_name} {split} {len(source)}"
    except Exception as error:  # what TFDS raises is up to the data set
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"--images=tfds:{name} (split {split}) cannot be opened ({reason[:300]}): expected a data set with `image` "
            "and `label`, prepared by `tfds build --file_format=array_record` (which needs TensorFlow)."
        ) from error
    return RandomAccess(source, class_names, tuple(f"{split}/{index}" for index in range(len(source))), identity)


_OPENERS: dict[str, Callable[[str, str], ImageSet]] = {"idx": open_idx, "tfds": open_tfds}


def _digest(keys: Sequence[str], labels: np.ndarray) -> str:
    content = hashlib.sha256(key_bytes_of("\0".join(keys)))
    content.update(labels.astype("<i4").tobytes())
    return content.hexdigest()[:16]


def key_bytes_of(key: str) -> bytes:
    """A key as it is stored: UTF-8, or whatever other bytes a file system has for a name."""
    return key.encode("utf-8", "surrogateescape")


def _files(root: Path, name: str) -> list[str]:
    found: list[str] = []
    for folder, _, files in os.walk(root / name, followlinks=True):
        place = Path(folder).relative_to(root)
        found.extend((place / file).as_posix() for file in files if file.lower().endswith(_SUFFIXES))
    return sorted(found)


def _size(path: Path) -> int:
    """Bytes of a file; -1 where there is none, as behind a link whose target is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _idx_pair(folder: Path, stem: str) -> tuple[Path, Path] | None:
    for ending in ("", ".gz"):
        images, labels = (folder / f"{stem}-{part}-ubyte{ending}" for part in ("images-idx3", "labels-idx1"))
        if images.is_file() and labels.is_file():
            return images, labels
    return None
