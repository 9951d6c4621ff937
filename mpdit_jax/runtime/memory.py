"""Memory of the host that is not given back: what glibc keeps, and what is lost with each checkpoint."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_ARENA_MAX, _ARENAS = -8, 2  # M_ARENA_MAX of malloc.h
_MODULE, _COUNTS = "orbax.checkpoint._src.serialization.tensorstore_utils", "get_tensorstore_raw_bytes"


def keep_few_arenas() -> bool:
    """Have all threads share two heaps. Without effect once there are more: call it before anything else.

    glibc gives threads heaps of their own, eight for each core. What the threads that save, evaluate and compile leave
    in each is scattered over it for the rest of a run: without this the digits' run grew by 80 MiB in an hour.

    Returns:
        Whether that is so from now on: not without glibc.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_ARENA_MAX, _ARENAS))


def return_freed() -> None:
    """Give back to the system what this process has freed.

    glibc keeps it, and what compilations and evaluations leave is as much again as a small run needs.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@contextmanager
def without_byte_counts() -> Iterator[None]:
    """Have Orbax save without asking TensorStore how many bytes it wrote, which only its own log would tell.

    TensorStore (0.1.79 to 0.1.86) never frees the lists and dictionaries of its answer, which are some 1,300 objects
    with every checkpoint, however small. Orbax has no option for it, so the function that asks is replaced meanwhile;
    a version of Orbax without it saves as it does.
    """
    names = vars(sys.modules[_MODULE]) if _MODULE in sys.modules else {}
    if _COUNTS not in names:
        yield
        return
    asks, names[_COUNTS] = names[_COUNTS], lambda *direction: 0  # of which Orbax says nothing
    try:
        yield
    finally:
        names[_COUNTS] = asks


@cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if library.malloc_trim and library.mallopt else None
    except (AttributeError, OSError):
        return None
