"""Pictures: opening encoded ones, and drawing arrays as PNG, GIF, contact sheets and film strips."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError, features

from mpdit_jax.errors import InputError
from mpdit_jax.io.atomic import atomic_write

_TILE = 40  # pixels; smaller images are enlarged by a whole factor so that a person can see them
_GAP = 2  # pixels between tiles
_AVIF = "avif" in features.modules and features.check_module("avif")  # not every build of Pillow reads it
# What pictures of a data set may be, whatever their names say. Pillow knows more, and has programs read some (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", *(["AVIF"] * _AVIF))
SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", *([".avif"] * _AVIF)
)  # fmt: skip
"""Endings, in lower case, of files that are taken for pictures."""
_TEXT = 14  # height of a caption's letters in pixels


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Round images in [-1, 1], (N, H, W, C) float, to uint8; values outside are clipped.

    Raises:
        InputError: NaN or Inf, with the index of the first such image.
    """
    finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
    if not finite.all():
        raise InputError(f"image {int(np.argmin(finite))} of {len(images)} holds NaN or Inf; the model has diverged.")
    return np.clip(np.rint((np.asarray(images, np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)


def open_picture(content: bytes) -> Image.Image:
    """Open the picture in a file's bytes without decoding it; no other program is started.

    Raises:
        PIL.UnidentifiedImageError: not a JPEG, PNG, WEBP, BMP, TIFF, PPM, GIF or, where Pillow reads it, AVIF.
    """
    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:  # its own words name an address in memory
        raise UnidentifiedImageError(f"cannot identify a picture of the kinds {', '.join(_FORMATS)}") from error


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Tile uint8 (N, H, W, C) row by row on white: uint8 (height, width, C)."""
    factor = max(1, -(-_TILE // images.shape[1]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top = _GAP + (index // columns) * (height + _GAP)
        left = _GAP + (index % columns) * (width + _GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet


def encode_png(picture: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 1 or 3) as PNG."""
    if picture.shape[-1] not in (1, 3):
        raise InputError(f"a picture has 1 or 3 channels, not {picture.shape[-1]}: decode latents before drawing them.")
    buffer = io.BytesIO()
    to_pil(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: str | Path, picture: np.ndarray) -> None:
    """Write uint8 (H, W, 1 or 3) as a PNG file."""
    content = encode_png(picture)
    with atomic_write(path) as file:
        file.write(content)


def contact_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> np.ndarray:
    """Draw a row of pictures for each name, with the name at the left, on white: uint8 (height, width, 3).

    Args:
        rows: names, and pictures uint8 (H, W, 1 or 3) of one size; rows may have different lengths.
    """
    columns = max(len(pictures) for _, pictures in rows)
    size = next(picture.shape for _, pictures in rows for picture in pictures)
    blank = np.full(size, 255, np.uint8)
    tiles = [[*pictures, *[blank] * (columns - len(pictures))] for _, pictures in rows]
    sheet = Image.fromarray(_colour(grid(np.array([tile for row in tiles for tile in row]), columns)))
    font = ImageFont.load_default(_TEXT)
    margin = 8 + max(round(font.getlength(name)) for name, _ in rows)
    canvas = Image.new("RGB", (sheet.width + margin, sheet.height), "white")
    canvas.paste(sheet, (margin, 0))
    draw, height = ImageDraw.Draw(canvas), (sheet.height - _GAP) / len(rows)
    for index, (name, _) in enumerate(rows):
        draw.text((4, _GAP + (index + 0.5) * height), name, "black", font, anchor="lm")
    return np.asarray(canvas)


def film_strip(frames: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Draw frames uint8 (n, B, H, W, 1 or 3) side by side, one row an image, with a caption over each column."""
    count = len(frames)
    strip = Image.fromarray(_colour(grid(frames.swapaxes(0, 1).reshape(-1, *frames.shape[2:]), count)))
    font = ImageFont.load_default(_TEXT)
    canvas = Image.new("RGB", (strip.width, strip.height + _TEXT + 6), "white")
    canvas.paste(strip, (0, _TEXT + 6))
    draw, width = ImageDraw.Draw(canvas), (strip.width - _GAP) / count
    for index, caption in enumerate(captions):
        draw.text((_GAP + (index + 0.5) * width, _TEXT / 2 + 3), caption, "black", font, anchor="mm")
    return np.asarray(canvas)


def save_gif(path: str | Path, frames: Sequence[np.ndarray], milliseconds: int = 60, last: int = 1500) -> None:
    """Write pictures uint8 (H, W, 1 or 3) as an endless GIF that shows the final one for `last` milliseconds."""
    pictures = [Image.fromarray(_colour(frame)) for frame in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [last]
    with atomic_write(path) as file:
        pictures[0].save(
            file, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=1
        )


def to_pil(picture: np.ndarray) -> Image.Image:
    """Return a PIL image of uint8 (H, W, 1 or 3)."""
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def _colour(picture: np.ndarray) -> np.ndarray:
    return picture.repeat(3, axis=-1) if picture.shape[-1] == 1 else picture
