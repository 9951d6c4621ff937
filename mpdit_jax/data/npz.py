"""Arrays from `.npz` and `.npy` files that somebody else has made: no objects, and no more than they hold."""

import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

_SHARE = 0.8  # of the machine's memory that arrays may take


def read_npz(path: str | Path, names: Sequence[str]) -> list[np.ndarray]:
    """Some arrays of an `.npz`, by name.

    Raises:
        ValueError: not an `.npz`, an array is missing, holds Python objects, has not as many bytes as its header says,
            or all of them together do not fit into the memory of this machine.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            missing = [name for name in names if f"{name}.npy" not in sizes]
            if missing:
                raise ValueError(f"no array {' and '.join(missing)} in it")
            total = sum(sizes[f"{name}.npy"] for name in names)
            if total > _SHARE * _memory():
                raise ValueError(f"{total / 2**30:,.1f} GiB of arrays do not fit into this machine's memory")
            return [_read(archive, name, sizes[f"{name}.npy"]) for name in names]
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{error or type(error).__name__}") from error


def read_npy(path: str | Path) -> np.ndarray:
    """The array of an `.npy`; raises ValueError as `read_npz` does."""
    try:
        with open(path, "rb") as file:
            return _checked(file, os.fstat(file.fileno()).st_size)
    except (OSError, EOFError) as error:
        raise ValueError(f"{error or type(error).__name__}") from error


def _read(archive: zipfile.ZipFile, name: str, size: int) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return _checked(file, size)


def _checked(file: IO[bytes], size: int) -> np.ndarray:
    """The array of an open file of `size` bytes, its header compared with that before anything is allocated."""
    try:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)
        shape, fortran_order, dtype = header
        count = math.prod(shape)
    except Exception as error:  # the header is a Python literal, and numpy does not say in which ways it can be wrong
        raise ValueError(f"its header cannot be read ({str(error).splitlines()[0][:100]})") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    content = file.read(count * dtype.itemsize + 1) if 0 <= count * dtype.itemsize <= size else b""
    if len(content) != count * dtype.itemsize:
        raise ValueError(f"its header says {dtype} {shape}, and its size is another")
    flat = np.frombuffer(content, dtype, count)
    return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)


def _memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
