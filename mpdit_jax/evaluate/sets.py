"""Images to look at, by what a user calls them: an .npz, a folder, a store of latents, a data set."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpdit_jax.data.crop import to_mode, to_square
from mpdit_jax.data.info import identity
from mpdit_jax.data.latent_store import LABELS, MANIFEST, LatentStore
from mpdit_jax.data.sources import SOURCES, Source, load_source
from mpdit_jax.errors import DataError, InputError
from mpdit_jax.io import pictures
from mpdit_jax.io.json_files import digest_of
from mpdit_jax.io.npz import map_npz, npz_checksums, npz_names, read_npz
from mpdit_jax.io.paths import expand

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
Decode = Callable[[np.ndarray], np.ndarray]
"""Unscaled latents float32 (n, h, w, C) to images (n, H, W, 1 or 3) in [-1, 1]."""
FindDecode = Callable[[Path, str], tuple[Decode, dict[str, Any]]]
"""From a store and the fingerprint of the VAE that encoded it to what decodes it, and the settings that change its
images; InputError where there is no such.
"""


class ImageBlocks(Protocol):
    """Images that can be read at any index."""

    @property
    def about(self) -> dict[str, Any]:
        """What it is, for the report; another set, or one changed since, says something else."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, C)."""


@dataclasses.dataclass(frozen=True)
class ArrayImages:
    """In memory, or mapped from a file."""

    images: np.ndarray  # uint8 (N, H, W, C)
    about: dict[str, Any]
    labels: np.ndarray | None = None  # int (N,), where the file has them

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Those rows."""
        return np.ascontiguousarray(self.images[indices])


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """Files below a folder, in the order of their names."""

    root: Path
    names: tuple[str, ...]
    shape: tuple[int, int, int]
    cropped: int  # pixels of the central square; 0 for images as they are
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Decode those files."""
        return np.stack([self._one(self.names[index]) for index in indices])

    def _one(self, name: str) -> np.ndarray:
        array = _decode_file(self.root / name, self.shape[2], self.cropped)
        if array.shape != self.shape:
            raise DataError(
                f"{self.root / name} is {array.shape[:2]} and {self.names[0]} is {self.shape[:2]} (height, width): "
                "expected one size, as samples have; of photographs that are a reference, give --image_size=PIXELS to "
                "cut squares of one size, as the reference batches of ImageNet were."
            )
        return array


@dataclasses.dataclass(frozen=True)
class DecodedLatents:
    """What a VAE makes of the means of a store's posteriors."""

    store: LatentStore
    shape: tuple[int, int, int]
    decode: Decode
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.store)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Decode those examples, not mirrored."""
        means = self.store.moments(indices)[0][:, 0].astype(np.float32)  # (n, h, w, C)
        return pictures.to_uint8(np.asarray(self.decode(means)))


@dataclasses.dataclass(frozen=True)
class SourceImages:
    """A data set that one can train on."""

    source: Any
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of each."""
        height, width, channels = self.source.shape
        return height, width, channels

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Those examples, brought back to 0…255."""
        return pictures.to_uint8(self.source.batch(indices)["x"])


def open_set(place: str, *, image_size: int = 0, channels: int = 3, find: FindDecode | None = None) -> ImageBlocks:
    """The images that a command's argument names.

    Args:
        place: an .npz with `arr_0`, a folder of images (with subfolders or not), a store of latents, or
            `data:NAME[:SPLIT]` for a data set of `mpdit_jax.data`, such as data:fashion_mnist:test.
        image_size: cut the images of a folder to central squares of this size; 0 to take them as they are.
        channels: of a folder's images: 3 for RGB, 1 for grey, see `Extractor.channels`.
        find: for stores of latents; without it they are refused.

    Raises:
        InputError, DataError: nothing there, or not of that form.
    """
    kind, colon, rest = place.partition(":")
    if colon and kind == "data":
        return _open_source(place, rest)
    path = expand(place)
    if path.is_dir():
        return _open_store(path, find) if (path / MANIFEST).is_file() else open_folder(path, image_size, channels)
    if not path.is_file():
        raise InputError(
            f"{place}: no such file or folder; expected an .npz, a folder of images, or a store of latents."
        )
    return open_npz(path)


def open_npz(path: Path) -> ArrayImages:
    """`arr_0` uint8 (N, H, W, 1 or 3) of an .npz, mapped and not loaded where it is not compressed; and its `labels`.

    Raises:
        InputError: no such array, another dtype or shape.
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
    about = _about(path, len(images), images.shape[1:], [path]) | {"contents": contents}
    if labels is None or labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        return ArrayImages(images, about)
    return ArrayImages(images, about | {"labels": count_labels(labels)}, labels)


def open_folder(root: Path, image_size: int = 0, channels: int = 3) -> FolderImages:
    """Every image below a folder, all as RGB (3 channels) or all as grey (1).

    Raises:
        DataError: none, or a first one that cannot be read.
    """
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not names:
        raise DataError(f"{root}: no images; expected names that end in {', '.join(_SUFFIXES)}.")
    first = _decode_file(root / names[0], channels, image_size)
    about = _about(root, len(names), first.shape, (root / name for name in names))
    about["crop"] = f"central square, {image_size}" if image_size else "none"
    return FolderImages(root, tuple(names), first.shape, image_size, about)


def count_labels(labels: np.ndarray) -> dict[str, int]:
    """How many classes there are among some labels (n,), and how many images the fewest and the most of one."""
    counts = np.unique(labels, return_counts=True)[1]
    return {"classes": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}


def _open_source(place: str, rest: str) -> SourceImages:
    name, _, split = rest.partition(":")
    if name not in SOURCES:
        raise InputError(f"{place}: expected data:NAME[:SPLIT] with a name of {', '.join(SOURCES)}.")
    source = load_source(name, "", split or ("all" if name == "digits" else "train"))
    return SourceImages(source, about_source(place, source))


def about_source(place: str, source: Source) -> dict[str, Any]:
    """What `ImageBlocks.about` says of a data set that one can train on."""
    about = {"path": place, "count": len(source), "shape": list(source.shape)}
    return about | {"contents": f"{identity(source)['data']} {source.contents}"}  # of the labels and of the whole


def _open_store(path: Path, find: FindDecode | None) -> DecodedLatents:
    if find is None:
        raise InputError(f"{path} is a store of latents: expected images.")
    store = LatentStore(path)
    if not len(store):
        raise DataError(f"{path}: there are no examples.")
    (decode, settings), size = find(path, store.manifest.vae_fingerprint), store.manifest.image_size
    one = np.asarray(decode(store.moments(np.arange(1))[0][:, 0].astype(np.float32)))
    # What `prepare` notes beside them is of the machine: processes of the same job, paths of the images.
    files = [path / name for name in (LABELS, *(shard.name for shard in store.manifest.shards))]
    about = _about(path, len(store), (size, size, one.shape[-1]), files)
    about |= {"contents": store.manifest.contents, "latents": "decoded means of the posteriors"}
    about |= {"vae": store.manifest.vae_fingerprint, **settings}
    return DecodedLatents(store, (one.shape[1], one.shape[2], one.shape[3]), decode, about)


def _about(path: Path, count: int, shape: Sequence[int], files: Iterable[Path]) -> dict[str, Any]:
    """Of images in some files below a folder, or in one: `files` in it is another when one of them is."""
    digest, listing, size = hashlib.sha256(), hashlib.sha256(), 0
    for file in files:
        try:
            known = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}): repair or remove it.") from error
        digest.update(f"{file} {known.st_size} {known.st_mtime_ns}\n".encode())
        listing.update(f"{file.relative_to(path)} {known.st_size}\n".encode())
        size += known.st_size
    return {
        "path": str(path),
        "count": count,
        "shape": list(shape),
        "bytes": size,
        "files": digest.hexdigest()[:16],  # whole names, sizes and times of change
        "contents": listing.hexdigest()[:16],  # names and sizes: the same of a copy elsewhere
    }


def _decode_file(path: Path, channels: int, cropped: int) -> np.ndarray:
    try:
        with pictures.open_picture(path.read_bytes()) as image:
            if cropped:
                return to_square(image, cropped, channels)
            array = np.asarray(to_mode(image, channels), np.uint8)
            return array.reshape(*array.shape[:2], channels)
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to, TypeError of a TIFF
        raise DataError(f"{path} cannot be used ({error}): repair or remove it.") from error
