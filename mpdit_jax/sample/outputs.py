"""Write a run's outputs: the `.npz` that evaluators read, single PNG files, and rows of a contact sheet."""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from mpdit_jax.io import pictures as images
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.sample.blocks import Block

SINGLE = "[0-9]*_[0-9]*.png"  # names of single images, as a pattern
_COLUMNS = 8  # images a class on a contact sheet
ROWS = 100  # classes on a picture or a contact sheet


def save_npz(path: Path, blocks: Callable[[], Iterable[Block]]) -> None:
    """Write `arr_0` (uint8 NHWC, as ADM's evaluator reads it) and int64 `labels`, with one block in memory at a time.

    Images with NaN or Inf are left out. `blocks` is called three times and returns the blocks in order.
    """
    labels = np.concatenate([block.labels[block.finite] for block in blocks()])
    shape = next(iter(blocks())).images.shape[1:]
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            _write_array(array, (len(labels), *shape), "|u1", (block.images[block.finite] for block in blocks()))
        with archive.open("labels.npy", "w") as array:
            _write_array(array, labels.shape, "<i8", iter([labels]))


def save_pngs(folder: Path, block: Block) -> None:
    """Write each image as FOLDER/INDEX_LABEL.png; images with NaN or Inf are left out."""
    for image, label, index, finite in zip(*block, strict=True):
        if finite:
            images.save_png(folder / f"{index:06d}_{label}.png", image)


def first_of_each(blocks: Iterable[Block], labels: np.ndarray, columns: int = _COLUMNS) -> dict[int, list[np.ndarray]]:
    """Return a contact sheet's images by label: the first `columns` of each of the first `ROWS` classes.

    One block is in memory at a time. `labels` (N,) are the labels of the whole run.
    """
    rows: dict[int, list[np.ndarray]] = {int(label): [] for label in np.unique(labels)[:ROWS]}
    for block in blocks:
        for image, label in zip(block.images, block.labels, strict=True):
            row = rows.get(int(label))
            if row is not None and len(row) < columns:
                row.append(image.copy())  # a view would keep the whole block in memory
    return rows


def _write_array(file: IO[bytes], shape: tuple[int, ...], dtype: str, parts: Iterator[np.ndarray]) -> None:
    npy.write_array_header_2_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    for part in parts:
        file.write(np.ascontiguousarray(part, dtype).tobytes())
