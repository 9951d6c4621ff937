"""Memory of the host that glibc keeps instead of giving it back to the system."""

import ctypes
from functools import cache
from typing import Any

_ARENA_MAX, _ARENAS = -8, 2  # M_ARENA_MAX of malloc.h


def keep_few_arenas() -> bool:
    """Make all threads share two heaps; call it first, as it has no effect once there are more.

    glibc gives threads heaps of their own, up to eight a core. Blocks that the threads for saving, evaluating and
    compiling leave in each fragment it for the rest of a run: without this the digits' run grew by 80 MiB in an hour.

    Returns:
        Whether this is glibc, and the limit is set.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_ARENA_MAX, _ARENAS))


def return_freed() -> None:
    """Return freed memory to the system.

    glibc keeps it otherwise: after compilations and evaluations as much again as a small run needs.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if library.malloc_trim and library.mallopt else None
    except (AttributeError, OSError):
        return None
