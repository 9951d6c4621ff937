"""Conversion of pictures of every mode to square RGB or grey arrays."""

import numpy as np
from PIL import Image

from mpdit_jax.errors import InputError

_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")
# A few hundred bytes can unpack to gigabytes, and a long thin picture grows when its short side is made to fit.
_MOST_PIXELS, _LONGEST = 2**27, 64
_STILL_FORMATS = ("MPO",)  # cameras put a preview behind the photograph


def to_square(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Crop a picture of any mode: uint8 (size, size, channels); see `to_mode` and `center_crop`."""
    return np.asarray(center_crop(to_mode(image, channels), size), np.uint8).reshape(size, size, channels)


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert a picture of any mode to RGB (3 channels) or grey (1); a transparent one is laid on white.

    The orientation that a camera notes is not applied, as in every published reference batch.

    Raises:
        InputError: several frames, pixel values that are no 8- or 16-bit numbers, or too many pixels.
    """
    short, long = sorted(image.size)
    if short * long > _MOST_PIXELS or long > _LONGEST * max(short, 1):
        raise InputError(
            f"{image.width} x {image.height} pixels; expected {_MOST_PIXELS:,} at most, and a long side of {_LONGEST} "
            "times the short one at most"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _STILL_FORMATS:
        raise InputError(f"animated or of several pages: {frames} frames; expected one picture")
    if image.mode == "F":
        raise InputError("pixels are floating-point numbers; expected whole numbers of 8 or 16 bits")
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"pixels range from {values.min()} to {values.max()}; expected 16 bits at most")
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Cut the central square at `size` pixels a side, as ADM prepares images (Dhariwal and Nichol, 2021).

    The picture is halved with a box filter while its shorter side stays at least twice `size`, then resized with a
    bicubic filter so that this side is `size` (small pictures grow), then cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
