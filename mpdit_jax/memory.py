"""Memory of the host that is free and not given back."""

import ctypes
from functools import cache
from typing import Any


def return_freed() -> None:
    """Give back to the system what this process has freed; does nothing where the C library is not glibc.

    glibc keeps freed memory for each thread that allocated it. What compilations and evaluations leave there is
    twice what a small run needs, and grows for hours as it is cut into smaller pieces.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
