import subprocess
import sys

import pytest

import mpdit_jax as mp


def test_import_is_fast_because_it_imports_nothing():
    script = "import sys, mpdit_jax; print([m for m in ('jax', 'flax', 'numpy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in mp.__all__:
        assert getattr(mp, name).__doc__
    assert set(mp.__all__) <= set(dir(mp))


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'make_samples'"):
        _ = mp.make_samples


def test_training_needs_neither_tensorflow_nor_torch():
    script = """
import sys
import mpdit_jax.train.loop, mpdit_jax.sample, mpdit_jax.train, mpdit_jax.interop.torch_weights
print([m for m in ("tensorflow", "torch") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
