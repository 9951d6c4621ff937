"""The process keeps few heaps, and returns freed memory to the system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Small blocks come from the heap, and one block in use at its end keeps the heap from shrinking. The program runs in a
# process of its own, as other objects of this process would change the figures.
_PROGRAM = """
import ctypes
from pathlib import Path

from mpdit_jax.runtime.memory import return_freed

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


# Eight threads that hold memory at the same time.
_THREADS = """
import ctypes, threading
from mpdit_jax.runtime.memory import keep_few_arenas

assert keep_few_arenas()
libc, meeting = ctypes.CDLL(None), threading.Barrier(9)
libc.malloc.restype = ctypes.c_void_p

def work():
    libc.malloc(5000)
    meeting.wait()
    meeting.wait()

for _ in range(8):
    threading.Thread(target=work).start()
meeting.wait()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
meeting.wait()
"""

glibc_alone = pytest.mark.skipif("glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="another C library")


@glibc_alone
def test_threads_share_two_heaps():
    root = Path(__file__).parents[2]
    for change, heaps in ((("", ""), {1, 2}), (("assert keep_few_arenas()", ""), {9})):
        command = [sys.executable, "-c", _THREADS.replace(*change)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        assert done.stdout.count("<heap nr=") in heaps


@glibc_alone
def test_return_freed():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout) > 100  # of 128 MiB
