"""Huge pages for the arrays of a CPU run.

Linux hands out memory in pages of 4 KiB and clears each when it is first touched; XLA takes and returns gigabytes every
step, and a large step spends a quarter of its time there. Where the system leaves huge pages to whoever asks for them
("madvise"), glibc from 2.35 on asks when its tunable says so, which it reads once, when a process starts.
"""

import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb=1"
_VARIABLE = "GLIBC_TUNABLES"
_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Start this process anew as it was started, with huge pages; returns where that would change nothing.

    Somebody's own GLIBC_TUNABLES are left as they are.
    """
    if _VARIABLE in os.environ or not _can_ask():
        return
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, os.environ | {_VARIABLE: TUNABLE})


def _can_ask() -> bool:
    """Whether this is glibc 2.35 or newer on a system where huge pages must be asked for."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return (
            name == "glibc"
            and tuple(map(int, version.split(".")[:2])) >= (2, 35)
            and "[madvise]" in _POLICY.read_text()
        )
    except (AttributeError, ValueError, OSError):  # another system than Linux, another libc
        return False
