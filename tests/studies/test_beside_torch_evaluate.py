"""`studies.beside_torch evaluate` prints what it measured."""

import subprocess
import sys

import pytest

from mpdit_jax.errors import InputError
from studies.beside_torch.evaluate import _as_text, make_evaluate_parser, measure, time_neighbours
from tests.tiny import environment


def test_neighbours_are_timed_and_told():
    assert time_neighbours(300, dimension=16) > 0
    text = _as_text({"neighbours": {"images": 300, "seconds": 1.0, "peak_bytes": 3 * 2**30}})
    assert text == "precision and recall of 300 by 300 images, 2048 features: 1.0 s, at most 3.00 GiB in memory"


_GROWTH = """
from studies.beside_torch.evaluate import time_neighbours
from studies.beside_torch.workers import peak_memory
time_neighbours(3000, dimension=16)  # compiles, and has blocks of the same size
before = peak_memory()
time_neighbours(12_288, dimension=16)
print(before, peak_memory())
"""


@pytest.mark.slow
def test_no_more_than_blocks_of_the_distances_are_in_memory():
    """The measurement runs in a process of its own, so that its peak memory is that of precision and recall alone."""
    told = subprocess.run([sys.executable, "-c", _GROWTH], env=environment(), stdout=subprocess.PIPE, check=True)
    before, after = map(int, told.stdout.split())
    assert before > 50 * 2**20  # bytes, of Python with its libraries
    assert after - before < 12_288**2 * 4 / 4  # a quarter of the whole matrix in float32


def test_the_table_names_both_contestants():
    row = {"version": "1", "device": "cpu"}
    both = {"jax": {**row, "images_per_s": 30.0}, "pytorch_fid": {**row, "images_per_s": 20.0}}
    text = _as_text({"image_size": 64, "batch_size": 2, **both, "jax_over_pytorch_fid": 1.5})
    assert "1.50x" in text
    assert "30.00 images/s" in text
    assert "not installed" in _as_text({"image_size": 64, "batch_size": 2, "jax": both["jax"]})


def test_bad_arguments_are_refused():
    from studies.beside_torch.__main__ import main

    with pytest.raises(InputError, match="--batch_size=0"):
        main(["evaluate", "--batch_size=0"])


@pytest.mark.parity
@pytest.mark.slow
def test_both_run_in_one_go():
    pytest.importorskip("pytorch_fid")
    options = make_evaluate_parser().parse_args(["--image_size=32", "--batch_size=1", "--repeats=1"])
    report = measure(options)
    assert report["jax"]["images_per_s"] > 0
    assert report["jax_over_pytorch_fid"] > 0
