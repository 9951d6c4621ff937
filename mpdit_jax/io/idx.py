"""The IDX format of MNIST and its descendants."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from mpdit_jax.errors import DataError

_UNSIGNED_BYTE = 8
_LARGEST = 2**31  # bytes: refuse a header that promises more before allocating it


def read_idx_pair(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Read SPLIT-images-idx3-ubyte and SPLIT-labels-idx1-ubyte, gzipped or not; the split "test" may be called t10k.

    Returns:
        Images uint8 (N, H, W), labels uint8 (N,), and the name of the images' file.

    Raises:
        FileNotFoundError: the pair is not there.
        DataError: damaged files, or other shapes.
    """
    for stem in (split, "t10k") if split == "test" else (split,):
        for ending in ("", ".gz"):
            paths = [folder / f"{stem}-{part}-ubyte{ending}" for part in ("images-idx3", "labels-idx1")]
            if all(path.is_file() for path in paths):
                images, labels = map(read_idx, paths)
                if images.ndim != 3 or labels.shape != images.shape[:1]:
                    raise DataError(
                        f"{folder}: images {images.shape}, labels {labels.shape}; expected (N, H, W) and (N,)."
                    )
                return images, labels, paths[0].name
    raise FileNotFoundError(f"{split}-images-idx3-ubyte and {split}-labels-idx1-ubyte, or both with .gz")


def read_idx(path: Path) -> np.ndarray:
    """Read the unsigned-byte array of an IDX file, gzipped if its name ends in `.gz`.

    Raises:
        DataError: not an IDX file of unsigned bytes, or shorter or longer than its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UNSIGNED_BYTE or not 1 <= magic[3] <= 4:
                raise DataError(f"{path} is not an IDX file of unsigned bytes (it starts with {magic!r}).")
            header = file.read(4 * magic[3])
            if len(header) < 4 * magic[3]:
                raise DataError(f"{path} ends inside its header; download it again.")
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
            size = int(np.prod(shape, dtype=object))
            if size > _LARGEST:
                raise DataError(f"{path} claims shape {shape}, more than {_LARGEST} bytes; it is damaged.")
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); download it again.") from error
    if len(content) != size:
        found = "more" if len(content) > size else len(content)
        raise DataError(f"{path} should hold {size} bytes for shape {shape} and holds {found}; download it again.")
    return np.frombuffer(content, np.uint8).reshape(shape)
