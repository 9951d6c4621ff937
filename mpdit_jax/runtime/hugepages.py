"""Huge pages for the arrays of a CPU run.

XLA allocates and frees gigabytes every step. Linux clears every page of 4 KiB on first use, which takes a quarter of a
large step's time; huge pages avoid this. If the system gives huge pages on request only ("madvise"), glibc 2.35 or
newer requests them when a tunable is set, which it reads when a process starts.
"""

import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb=1"
_VARIABLE = "GLIBC_TUNABLES"
_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Restart this process with huge pages, unless the tunable has no effect or the user has set GLIBC_TUNABLES."""
    if _VARIABLE in os.environ or not _tunable_has_effect():
        return
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, os.environ | {_VARIABLE: TUNABLE})


def _tunable_has_effect() -> bool:
    """Return whether this is glibc 2.35 or newer on a system that gives huge pages on request only."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return (
            name == "glibc"
            and tuple(map(int, version.split(".")[:2])) >= (2, 35)
            and "[madvise]" in _POLICY.read_text()
        )
    except (AttributeError, ValueError, OSError):  # not Linux, or another libc
        return False
