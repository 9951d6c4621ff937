import atexit
import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile

# Before JAX is imported: tests are for every machine, with or without an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes longer than everything that is computed. The processes that tests start inherit it, so that the bits
# of one can be compared with those of another.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# Nor do tests need to know from which line of Python an operation comes; finding out takes a tenth of their time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# One part per program instead of 32, and, up to jaxlib 0.10, the emitters of single operations in place of those of
# fused loops, which go through MLIR and take four fifths of a small program's compilation. Later versions have no other
# emitters, and end the process at a flag they do not know. CI's jobs `parity` and `optimized` run without these flags.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10."),
)
# Several processes share the cores, where OpenBLAS's threads wait for each other by spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # The processes that tests start compile the same few programs; one session compiles each once.
    CACHE = tempfile.mkdtemp(prefix="mpdit_jax_tests_")
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

from pathlib import Path

import numpy as np
import pytest

# Tracing makes objects by the million, few of them garbage: looking for it as often as Python does by default takes a
# tenth of the time of tests that trace.
gc.set_threshold(50_000, 20, 50)

# A shell that starts the suite in the background has it ignore Ctrl-C, and the processes that tests start with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled_is_kept():
    """Free each module's compiled programs, hundreds of which would fill a laptop's memory."""
    yield
    import jax

    jax.clear_caches()


GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One file of golden arrays: images channels-last, state dict and gradients under their PyTorch names."""

    def __init__(self, name):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
            self.arrays = {key: archive[key] for key in archive.files}

    def __getitem__(self, key):
        return self.arrays[key]

    def images(self, key):
        return np.moveaxis(self.arrays[key], -3, -1)

    def group(self, prefix):
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}


def relative_error(found, expected):
    """Largest absolute difference over the expected array's largest magnitude."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="session", params=["mpdit_two_level_fno", "mpdit_three_level_mlp"])
def golden(request):
    return Golden(request.param)
