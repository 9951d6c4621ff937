"""Arrays from `.npz` and `.npy` files of any origin: no Python objects, and no more memory than a file's size."""

import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

_SHARE = 0.8  # of the machine's memory that arrays may take
# The errors of a file that is no zip, or one that Python's reader does not know.
_UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OverflowError)


@contextmanager
def _archive(path: str | Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _UNREADABLE as error:
        raise ValueError(f"{error or type(error).__name__}") from error


def read_npz(path: str | Path, names: Sequence[str]) -> list[np.ndarray]:
    """Read some arrays of an `.npz`, by name.

    Raises:
        ValueError: not an `.npz`, an array is missing, holds Python objects, has not as many bytes as its header says,
            or all of them together do not fit into the memory of this machine.
    """
    with _archive(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        if missing := [name for name in names if f"{name}.npy" not in sizes]:
            raise ValueError(f"no array {' and '.join(missing)} in it")
        total = sum(sizes[f"{name}.npy"] for name in names)
        if total > _SHARE * _memory():
            raise ValueError(f"{total / 2**30:,.1f} GiB of arrays do not fit into this machine's memory")
        found = []
        for name in names:
            with archive.open(f"{name}.npy") as file:
                found.append(_checked(file, sizes[f"{name}.npy"]))
        return found


def npz_names(path: str | Path) -> set[str]:
    """Return the names of the arrays of an `.npz`. Raise ValueError if it is none."""
    return {name.removesuffix(".npy") for name in npz_checksums(path)}


def npz_checksums(path: str | Path) -> dict[str, tuple[int, int]]:
    """Return bytes and CRC-32 of each file in an `.npz`, from its directory alone. Raise ValueError if it is none."""
    with _archive(path) as archive:
        return {entry.filename: (entry.file_size, entry.CRC) for entry in archive.infolist()}


def map_npz(path: str | Path, name: str) -> np.ndarray:
    """Map one array of an `.npz` into memory, or read it if it is compressed. Raises ValueError as `read_npz` does."""
    with _archive(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise ValueError(f"no array {name} in it")
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as file:
            shape, fortran_order, dtype = _header(file)
            start = file.tell()
    if info.compress_type != zipfile.ZIP_STORED or fortran_order or 0 in shape or dtype.hasobject:
        return read_npz(path, [name])[0]
    try:
        with open(path, "rb") as raw:
            raw.seek(info.header_offset + 26)  # lengths of name and extra field in the member's own header
            lengths = np.frombuffer(raw.read(4), "<u2")
        # Sizes are Python's: the system compares them with the file before anything is mapped.
        return np.memmap(path, dtype, "r", offset=info.header_offset + 30 + int(lengths.sum()) + start, shape=shape)
    except (*_UNREADABLE, TypeError) as error:
        raise ValueError(f"{error or type(error).__name__}") from error


def read_npy(path: str | Path) -> np.ndarray:
    """Read the array of an `.npy`; raises ValueError as `read_npz` does."""
    try:
        with open(path, "rb") as file:
            return _checked(file, os.fstat(file.fileno()).st_size)
    except (OSError, EOFError) as error:
        raise ValueError(f"{error or type(error).__name__}") from error


def _checked(file: IO[bytes], size: int) -> np.ndarray:
    """Return the array of an open file, after comparing its header with the `size` of the file in bytes."""
    shape, fortran_order, dtype = _header(file)
    count = math.prod(shape)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    content = file.read(count * dtype.itemsize + 1) if 0 <= count * dtype.itemsize <= size else b""
    if len(content) != count * dtype.itemsize:
        raise ValueError(f"its header says {dtype} {shape}, and its size is another")
    flat = np.frombuffer(content, dtype, count)
    return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran's order, dtype); no size in the shape is negative."""
    try:
        version = npy.read_magic(file)
        shape, fortran_order, dtype = (
            npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)
        )
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")
    except Exception as error:  # the header is a Python literal, and numpy does not say in which ways it can be wrong
        raise ValueError(f"its header cannot be read ({str(error).splitlines()[0][:100]})") from error
    return shape, fortran_order, dtype


def _memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
