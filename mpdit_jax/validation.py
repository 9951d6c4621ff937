"""Checks of single values, and the nearest known name."""

import difflib
import numbers
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from mpdit_jax.errors import InputError

LARGEST_SIDE = 4096  # pixels of a square image
_LARGEST_LATENT = 50.0  # beyond what any VAE's normalized latents reach, and below an image's 255


def suggest(name: str, known: Collection[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name nearest to `name`, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number, NumPy's included; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_seed(seed: Any, name: str) -> None:
    """Raise InputError unless `seed` fits a random key; `name` is the flag or argument."""
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise InputError(f"{name}={seed!r}: expected a whole number from 0 to {2**32 - 1}.")


def check_image_size(pixels: Any, name: str, least: int = 1) -> None:
    """Raise InputError unless `pixels` is a possible side of square images."""
    if not is_whole(pixels) or not least <= pixels <= LARGEST_SIDE:
        raise InputError(f"{name}={pixels!r}: expected {least} to {LARGEST_SIDE} pixels.")


def is_real(value: Any) -> bool:
    """Return whether a value is a real number, NumPy's included; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def layout_remedy(shape: Sequence[int], name: str) -> str:
    """Say how to bring images of this shape to (N, H, W, C), with `: ` in front; "" if they may have that layout."""
    if len(shape) == 3:
        return f": add the axis of channels by {name}[..., None] for grey images, or [None] for a single one"
    if len(shape) != 4:
        return ""
    _, height, width, channels = shape
    # Channels-last images that are not square have few channels: (8, 32, 32) is taken for 8 channels of 32 x 32 pixels.
    first = height != width and channels > 4 and (width == channels or height <= 4)
    return f": the channels are first, give {name}.transpose(0, 2, 3, 1)" if first else ""


def dtype_remedy(dtype: np.dtype[Any], name: str) -> str:
    """Say how to bring images of this dtype to uint8 or float32, with `: ` in front; "" if there is no way."""
    if dtype.kind == "f" and dtype != np.float32:
        return f": give {name}.astype(np.float32)"
    return (
        f": give {name}.astype(np.uint8), if they go from 0 to 255" if dtype.kind in "iu" and dtype != np.uint8 else ""
    )


def range_remedy(least: float, most: float, channels: int = 0) -> str:
    """Say how to bring floats between `least` and `most` to the range of images or latents; "" if they may be in it.

    Whole sets with 1 or 3 channels are images in [-1, 1]. Others may be latents, or a few bright images.
    """
    images = channels in (1, 3)
    if least >= 0 and (2 if images else _LARGEST_LATENT) < most <= 255:
        return "give images / 127.5 - 1"
    if images and least >= 0 and 0 < most <= 1.01:
        return "give images * 2 - 1"
    if channels == 4 and least >= 0 and 0 < most <= 1.01:
        return "give images[..., :3] * 2 - 1, without the channel of opacity"
    if max(-least, most) > (1.01 if images else _LARGEST_LATENT):
        return "rescale them"
    return ""
