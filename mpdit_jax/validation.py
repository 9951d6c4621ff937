"""Checks of single values, and the nearest known name."""

import difflib
import numbers
from collections.abc import Collection
from typing import Any

from mpdit_jax.errors import InputError

LARGEST_SIDE = 4096  # pixels of a square image


def suggest(name: str, known: Collection[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name nearest to `name`, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, NumPy's included; True and False are not."""
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
    """Whether a value is a real number, NumPy's included; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
