"""The protocol of training data, and the labelled data sets that implement it."""

import dataclasses
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mpdit_jax.data.latents import LatentSpace, Statistics, load_latents
from mpdit_jax.errors import DataError, DataWarning
from mpdit_jax.io.idx import read_idx_pair
from mpdit_jax.io.json_files import digest_of
from mpdit_jax.io.npz import npz_checksums, read_npz
from mpdit_jax.io.paths import expand
from mpdit_jax.validation import dtype_remedy, layout_remedy, range_remedy

Batch = dict[str, np.ndarray]
"""`y` int32 (n,), and `x` float32 (n, H, W, C) or, of latents, `mean` and `std` float16 (n, views, H, W, C)."""

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_MOST_CLASSES = 2**20  # beyond any data set, and few enough to give each a name
_MOST_SHOWN = 5  # classes without examples
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Batched(Protocol):
    """Examples that can be read at any index."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the examples at `indices` (n,)."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A labelled set of images or latents to train on."""

    labels: np.ndarray  # whole numbers (N,)
    class_names: tuple[str, ...]  # in label order
    shape: tuple[int, int, int]  # (H, W, C) of an example
    read: Callable[[np.ndarray], Batch]  # from rows (n,) of the whole set to a batch without `y`
    contents: str = ""  # a digest that differs where the files hold other examples under the same labels
    latents: LatentSpace | None = None  # how the examples relate to a VAE's latents; None for images
    rows: np.ndarray | None = None  # int (N,): rows of the whole set; None for all
    measured: Statistics | None = None  # of latents

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the examples at `indices` (n,)."""
        rows = indices if self.rows is None else self.rows[indices]
        return {**self.read(rows), "y": self.labels[indices].astype(np.int32)}

    def take(self, indices: np.ndarray) -> "Source":
        """Return the part of the examples at `indices` (n,), in any order and as often as wanted."""
        return dataclasses.replace(self, labels=self.labels[indices], rows=rows_of(self)[indices])


def array_source(
    images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], largest: int = 255, contents: str = ""
) -> Source:
    """Images in memory (N, H, W, C): whole numbers scaled from [0, largest] to [-1, 1], or float32 as they are."""

    def read(rows: np.ndarray) -> Batch:
        x = images[rows].astype(np.float32)
        return {"x": x if images.dtype.kind == "f" else x / np.float32(largest / 2) - 1}

    height, width, channels = images.shape[1:]
    return Source(labels, class_names, (height, width, channels), read, contents)


def load_digits(path: str = "", split: str = "all") -> Source:
    """Load scikit-learn's 1,797 handwritten digits, 8x8x1, values 0 to 16; `path` is not used.

    The split is "all", "train" or "test"; the latter two are halves with the same share of every class.
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
    return array_source(images, labels, tuple(str(digit) for digit in range(10)), 16, _checksum(images))


def load_fashion_mnist(path: str = "", split: str = "train") -> Source:
    """Load Zalando's Fashion-MNIST: 60,000 training or 10,000 test images, padded from 28x28 to 32x32x1.

    Args:
        path: folder of the four IDX files, gzipped or not; default where Debian's package puts them.
        split: "train" or "test".
    """
    _known_split(split, ("train", "test"))
    folder = Path(path) if path else _DEBIAN_FASHION_MNIST
    try:
        images, labels, _ = read_idx_pair(folder, split)
    except FileNotFoundError as error:
        raise DataError(
            f"Fashion-MNIST not found in {folder}: install Debian's package (apt-get install dataset-fashion-mnist), "
            f"or download the four IDX files and pass their folder as --config.data.path=FOLDER (expected {error})."
        ) from error
    if images.shape[1:] != (28, 28):
        raise DataError(f"{folder}: images {images.shape}; expected (N, 28, 28).")
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]  # (N, 32, 32, 1)
    return _checked(padded, labels, FASHION_MNIST_CLASSES, _checksum(images), str(folder))


def load_arrays(path: str = "", split: str = "train") -> Source:
    """Load `images` (N, H, W, C), uint8 or float32 in [-1, 1], and `labels` (N,) of an `.npz`; it has no splits."""
    if not path or not Path(path).is_file():
        raise DataError(f"config.data.path={path!r}: no such file; the source 'arrays' reads an .npz.")
    try:
        images, labels = read_npz(path, ("images", "labels"))
        checksums = npz_checksums(path)  # of the file's directory: reading all of it takes long
    except ValueError as error:
        raise DataError(f"{path}: expected an .npz with arrays `images` and `labels` ({error}).") from error
    remedy = layout_remedy(images.shape, "images") or dtype_remedy(images.dtype, "images")
    if remedy or images.ndim != 4 or images.dtype not in (np.uint8, np.float32) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: images {images.dtype} {images.shape}, labels {labels.shape}; "
            f"expected images uint8 or float32 (N, H, W, C) and labels (N,){remedy}."
        )
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels are {labels.dtype}; expected whole numbers.")
    contents = digest_of([checksums[f"{array}.npy"] for array in ("images", "labels")])
    return _checked(images, labels, number_names(labels, path), contents, path)


def number_names(labels: np.ndarray, origin: str) -> tuple[str, ...]:
    """Call the classes from 0 to the largest of `labels` (n,) by their numbers.

    Raises:
        DataError: a label below 0, or larger than any data set has.
    """
    least, most = int(labels.min(initial=0)), int(labels.max(initial=0))
    if least < 0 or most >= _MOST_CLASSES:
        bad = f"{least} is too small" if least < 0 else f"{most} is too large"
        raise DataError(f"{origin}: label {bad}; expected classes numbered from 0 without gaps.")
    return tuple(map(str, range(most + 1)))


def take_evenly(source: Source, count: int) -> Source:
    """`count` examples evenly spread over a source, which often lies class by class; all if it has no more."""
    return source if count >= len(source) else source.take(np.arange(count) * len(source) // count)


def rows_of(source: Source) -> np.ndarray:
    """Rows (n,) of the whole data set that a source has, in its order."""
    return np.arange(len(source)) if source.rows is None else source.rows


def balanced(source: Source) -> Source:
    """Repeat examples until every class has as many as the largest, evenly over the class's examples."""
    classes = [np.flatnonzero(source.labels == label) for label in np.unique(source.labels)]
    most = max(len(members) for members in classes)
    return source.take(np.concatenate([members[np.arange(most) * len(members) // most] for members in classes]))


def _load_latents(path: str, normalization: str) -> Source:
    store, space = load_latents(path, normalization)

    def read(rows: np.ndarray) -> Batch:
        mean, std = store.moments(rows)
        return {"mean": mean, "std": std}

    manifest = store.manifest
    measured = manifest.latent_mean, manifest.latent_std
    return Source(
        store.labels, manifest.class_names, manifest.latent_shape, read, manifest.contents, space, measured=measured
    )


# Each raises DataError for an unknown split, missing or damaged files, or arrays of another form.
SOURCES: dict[str, Callable[[str, str], Source]] = {
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
    normalization: str = "auto",
    max_examples: int = 0,
    class_balance: bool = False,
    threads: int = 1,
) -> Source:
    """Load the data set that `config.data` describes. `threads` is ignored here; the pipeline uses it.

    Raises:
        DataError: unknown name, missing or damaged files.
        ConfigError: a normalization that does not fit the latents.
    """
    if name not in NAMES:
        raise DataError(f"config.data.name={name!r}: expected one of {', '.join(NAMES)}.")
    path = str(expand(path)) if path else ""  # a config file may say "~/mine.npz"
    source = _load_latents(path, normalization) if name == "latents" else SOURCES[name](path, split)
    if max_examples:
        source = take_evenly(source, max_examples)
    return balanced(source) if class_balance else source


def check_fits(source: Source, input_shape: tuple[int, int, int], num_classes: int) -> None:
    """Raise DataError unless the source's examples and classes fit the model; warn of classes without examples."""
    if source.shape != input_shape:
        raise DataError(
            f"the data's examples are {source.shape} and the model takes {input_shape} (height, width, channels): "
            f"set model.input_size={source.shape[:2]} and model.in_channels={source.shape[2]}."
        )
    if len(source.class_names) > num_classes:
        raise DataError(
            f"the data has {len(source.class_names)} classes and the model {num_classes}{_from_one(source.labels)}: "
            f"set model.num_classes={len(source.class_names)}."
        )
    warn_of_unseen(source.labels, source.class_names, num_classes)


def unseen_classes(labels: np.ndarray, num_classes: int) -> tuple[int, ...]:
    """Return the classes from 0 to `num_classes` - 1 that are not among `labels` (n,)."""
    return tuple(
        np.flatnonzero(np.bincount(labels.astype(np.int64), minlength=num_classes)[:num_classes] == 0).tolist()
    )


def warn_of_unseen(labels: np.ndarray, class_names: Sequence[str], num_classes: int, origin: str = "the data") -> None:
    """Name the classes without examples in a DataWarning."""
    if unseen := unseen_classes(labels, num_classes):
        names = [class_names[one] if one < len(class_names) else f"class {one}" for one in unseen]
        shown = ", ".join(names[:_MOST_SHOWN]) + ", …" * (len(names) > _MOST_SHOWN)
        warnings.warn(
            f"{origin}: {len(unseen)} of {num_classes} classes have no examples and are not trained "
            f"({shown}){_from_one(labels)}. Balanced draws leave them out. Add examples, or give fewer classes.",
            DataWarning,
            stacklevel=2,
        )


def _from_one(labels: np.ndarray) -> str:
    from_one = len(labels) and labels.min() == 1
    return f" (labels run from 1 to {labels.max()} and seem to start at 1: store labels - 1)" if from_one else ""


def _checksum(images: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(images).data):08x}"


def _checked(
    images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], contents: str, origin: str
) -> Source:
    if not len(images):
        raise DataError(f"{origin}: there are no images.")
    for bad in (int(labels.min()), int(labels.max())):
        if not 0 <= bad < len(class_names):
            raise DataError(f"{origin}: label {bad} is outside 0 to {len(class_names) - 1}.")
    if images.dtype.kind == "f":
        least, most = np.inf, -np.inf
        for start in range(0, len(images), 1024):  # a part at a time: the set may fill half of the memory
            part = images[start : start + 1024]
            finite = np.isfinite(part).reshape(len(part), -1).all(axis=1)
            if not finite.all():
                bad = start + int(np.argmin(finite))
                raise DataError(f"{origin}: example {bad} of the data holds NaN or Inf; remove or repair it.")
            least, most = min(least, part.min()), max(most, part.max())
        if remedy := range_remedy(least, most, images.shape[-1]):
            raise DataError(f"{origin}: images range from {least:.3g} to {most:.3g}; expected -1 to 1: {remedy}.")
    return array_source(images, labels, class_names, contents=contents)


def _known_split(split: str, known: tuple[str, ...]) -> None:
    if split not in known:
        raise DataError(f"config.data.split={split!r}: expected one of {', '.join(known)}.")
