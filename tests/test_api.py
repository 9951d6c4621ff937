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


def test_train_is_a_function_and_a_package():
    """Importing a module of the package sets `mpdit_jax.train` to the package."""
    for before in ("", "import mpdit_jax.train.writers"):
        script = f"""
{before}
import sys, mpdit_jax as mp
assert callable(mp.train) and "jax" not in sys.modules
import mpdit_jax.train.loop
mpdit_jax.train.loop.train = lambda config, workdir: (config, workdir)
print(mp.train("config", workdir="runs/x"))
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "('config', 'runs/x')"


def test_training_needs_neither_tensorflow_nor_torch():
    script = """
import sys
import mpdit_jax.train.loop, mpdit_jax.sample, mpdit_jax.train, mpdit_jax.interop.torch_weights
print([m for m in ("tensorflow", "torch") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
