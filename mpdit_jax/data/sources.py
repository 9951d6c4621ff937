"""Labelled image sets, each a random-access `Source` of the same form."""

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from mpdit_jax.data.latents import LatentSpace, load_latents
from mpdit_jax.errors import DataError
from mpdit_jax.io.files import digest_of, expand
from mpdit_jax.io.idx import read_idx
from mpdit_jax.io.npz import npz_checksums, read_npz

Batch = dict[str, np.ndarray]
"""`y` int32 (n,), and `x` float32 (n, H, W, C) or, of latents, `mean` and `std` float16 (n, views, H, W, C)."""

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_MOST_CLASSES = 2**20  # beyond any data set, and few enough to give each a name
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Batched(Protocol):
    """Examples that can be read at any index."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples at `indices` (n,)."""


class Source(Batched, Protocol):
    """A labelled set of images or latents."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an example."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class, in label order."""

    @property
    def labels(self) -> np.ndarray:
        """Whole numbers (N,)."""

    @property
    def latents(self) -> LatentSpace | None:
        """How the examples relate to a VAE's latents; None for images."""

    @property
    def contents(self) -> str:
        """A digest that is another where the files hold other examples, though under the same labels."""


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images held in memory: uint8 or another integer type scaled from [0, largest] to [-1, 1], or float32 as it is."""

    images: np.ndarray  # (N, H, W, C)
    labels: np.ndarray  # (N,)
    class_names: tuple[str, ...]
    largest: int = 255
    contents: str = ""  # of what the images were read from

    @property
    def latents(self) -> None:
        """None: these are images."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an example."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples at `indices`."""
        x = self.images[indices].astype(np.float32)
        if self.images.dtype.kind != "f":
            x = x / np.float32(self.largest / 2) - 1
        return {"x": x, "y": self.labels[indices].astype(np.int32)}


def load_digits(path: str = "", split: str = "all") -> ArraySource:
    """scikit-learn's 1,797 handwritten digits, 8x8x1, values 0 to 16.

    Args:
        path: unused; the images come with scikit-learn.
        split: "all", or "train" and "test": two halves with the same share of every class.

    Raises:
        DataError: unknown split.
    """
    from sklearn import datasets, model_selection

    _known_split(split, ("all", "train", "test"))
    digits = datasets.load_digits()
    images, labels = digits.images.astype(np.uint8)[..., None], digits.target
    if split != "all":
        everything = np.arange(len(labels))
        halves = model_selection.train_test_split(everything, test_size=0.5, stratify=labels, random_state=0)
        chosen = np.sort(halves[0 if split == "train" else 1])
        images, labels = images[chosen], labels[chosen]
    return ArraySource(images, labels, tuple(str(digit) for digit in range(10)), 16, _checksum(images))


def load_fashion_mnist(path: str = "", split: str = "train") -> ArraySource:
    """Zalando's Fashion-MNIST: 60,000 training and 10,000 test images of clothes, padded from 28x28 to 32x32x1.

    Args:
        path: folder of the four IDX files, gzipped or not; default where Debian's package puts them.
        split: "train" or "test".

    Raises:
        DataError: files missing or damaged, or unknown split.
    """
    _known_split(split, ("train", "test"))
    folder = Path(path) if path else _DEBIAN_FASHION_MNIST
    stem = {"train": "train", "test": "t10k"}[split]
    try:
        images = read_idx(_gzipped_or_not(folder / f"{stem}-images-idx3-ubyte"))
        labels = read_idx(_gzipped_or_not(folder / f"{stem}-labels-idx1-ubyte"))
    except FileNotFoundError as error:
        raise DataError(
            f"Fashion-MNIST not found in {folder}: install Debian's package (apt-get install dataset-fashion-mnist), "
            f"or download the four IDX files and pass their folder as --config.data.path=FOLDER ({error.args[0]})."
        ) from error
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise DataError(f"{folder}: images {images.shape}, labels {labels.shape}; expected (N, 28, 28) and (N,).")
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]  # (N, 32, 32, 1)
    return _checked(ArraySource(padded, labels, FASHION_MNIST_CLASSES, contents=_checksum(images)), str(folder))


def load_arrays(path: str = "", split: str = "train") -> ArraySource:
    """Your own images from an `.npz`: `images` (N, H, W, C), uint8 or float32 in [-1, 1], and `labels` (N,).

    Args:
        path: the `.npz` file.
        split: unused; the file is the split.

    Raises:
        DataError: missing or damaged file, or arrays of another form.
    """
    if not path or not Path(path).is_file():
        raise DataError(f"config.data.path={path!r}: no such file; the source 'arrays' reads an .npz.")
    try:
        images, labels = read_npz(path, ("images", "labels"))
        checksums = npz_checksums(path)  # those in the file: it may hold more than one wants to digest at every start
    except ValueError as error:
        raise DataError(f"{path}: expected an .npz with arrays `images` and `labels` ({error}).") from error
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: images {images.dtype} {images.shape}, labels {labels.shape}; "
            "expected images uint8 or float32 (N, H, W, C) and labels (N,)."
        )
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels are {labels.dtype}; expected whole numbers.")
    if labels.max(initial=0) >= _MOST_CLASSES:
        raise DataError(f"{path}: label {labels.max()} is too large; expected classes numbered from 0 without gaps.")
    names = tuple(str(label) for label in range(int(labels.max(initial=0)) + 1))
    contents = digest_of([checksums[f"{array}.npy"] for array in ("images", "labels")])
    return _checked(ArraySource(images, labels, names, contents=contents), path)


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some examples of a source, in any order and as often as wanted."""

    source: Source
    indices: np.ndarray  # (n,)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an example."""
        return self.source.shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class, in label order."""
        return self.source.class_names

    @property
    def labels(self) -> np.ndarray:
        """Whole numbers (n,)."""
        return self.source.labels[self.indices]

    @property
    def latents(self) -> LatentSpace | None:
        """Those of the whole source."""
        return self.source.latents

    @property
    def contents(self) -> str:
        """Those of the whole source."""
        return self.source.contents

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples at `indices` of this subset."""
        return self.source.batch(self.indices[indices])


def limited(source: Source, count: int) -> Source:
    """`count` examples evenly spread over a source, which often lies class by class; all if it has no more."""
    if count >= len(source):
        return source
    return Subset(source, np.arange(count) * len(source) // count)


def rows_of(source: Source) -> np.ndarray:
    """Which examples (n,) of the whole data set a source has, in its order."""
    return rows_of(source.source)[source.indices] if isinstance(source, Subset) else np.arange(len(source))


def balanced(source: Source) -> Source:
    """Every class as often as the largest: the examples of the smaller ones come several times, equally often or once
    more, and which come once more is spread over the class.
    """
    classes = [np.flatnonzero(source.labels == label) for label in np.unique(source.labels)]
    most = max(len(members) for members in classes)
    return Subset(source, np.concatenate([members[np.arange(most) * len(members) // most] for members in classes]))


SOURCES: dict[str, Callable[[str, str], ArraySource]] = {
    "digits": load_digits,
    "fashion_mnist": load_fashion_mnist,
    "arrays": load_arrays,
}
NAMES = (*SOURCES, "latents")


def load_source(
    name: str,
    path: str,
    split: str,
    *,
    normalization: str = "paper",
    max_examples: int = 0,
    class_balance: bool = False,
    threads: int = 1,
) -> Source:
    """The data set `config.data` describes; the arguments are its fields, of which `threads` is for the pipeline.

    Raises:
        DataError: unknown name, missing or damaged files.
        ConfigError: a normalization that does not fit the latents.
    """
    if name not in NAMES:
        raise DataError(f"config.data.name={name!r}: expected one of {', '.join(NAMES)}.")
    path = str(expand(path)) if path else ""  # a config file may say "~/mine.npz"
    source: Source = load_latents(path, split, normalization) if name == "latents" else SOURCES[name](path, split)
    if max_examples:
        source = limited(source, max_examples)
    return balanced(source) if class_balance else source


def check_fits(source: Source, input_shape: tuple[int, int, int], num_classes: int) -> None:
    """Raise DataError unless the source's examples and classes fit the model."""
    if source.shape != input_shape:
        raise DataError(
            f"the data's examples are {source.shape} and the model takes {input_shape} (height, width, channels): "
            f"set model.input_size={source.shape[:2]} and model.in_channels={source.shape[2]}."
        )
    if len(source.class_names) > num_classes:
        raise DataError(
            f"the data has {len(source.class_names)} classes and the model {num_classes}: "
            f"set model.num_classes={len(source.class_names)}."
        )


def _checksum(images: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(images).data):08x}"


def _checked(source: ArraySource, origin: str) -> ArraySource:
    if not len(source):
        raise DataError(f"{origin}: there are no images.")
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= len(source.class_names):
        bad = low if low < 0 else high
        raise DataError(f"{origin}: label {bad} is outside 0 to {len(source.class_names) - 1}.")
    if source.images.dtype.kind == "f":
        for start in range(0, len(source), 1024):  # a part at a time: the set may fill half of the memory
            finite = np.isfinite(source.images[start : start + 1024]).reshape(-1, source.images[0].size).all(axis=1)
            if not finite.all():
                bad = start + int(np.argmin(finite))
                raise DataError(f"{origin}: example {bad} of the data holds NaN or Inf; remove or repair it.")
    return source


def _known_split(split: str, known: tuple[str, ...]) -> None:
    if split not in known:
        raise DataError(f"config.data.split={split!r}: expected one of {', '.join(known)}.")


def _gzipped_or_not(path: Path) -> Path:
    zipped = path.with_name(path.name + ".gz")
    return zipped if zipped.is_file() else path
