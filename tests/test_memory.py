"""Freed memory goes back to the system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Small pieces come from the heap, where one that is still in use at its end keeps all of it. In a process of its own:
# what else lives in this one would move the figures.
_PROGRAM = """
import ctypes
from pathlib import Path

from mpdit_jax.memory import return_freed

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
resident = lambda: 4096 * int(Path("/proc/self/statm").read_text().split()[1])
pieces = [libc.malloc(65536) for _ in range(2048)]
for piece in pieces:
    ctypes.memset(piece, 1, 65536)
for piece in pieces[:-1]:
    libc.free(piece)
before = resident()
return_freed()
print((before - resident()) // 2**20)
"""


@pytest.mark.skipif("glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="another C library")
def test_return_freed():
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout) > 100  # of 128 MiB
