import json
from importlib.util import find_spec

import pytest

from mpdit_jax.errors import InputError, MPDiTError, WeightsError
from mpdit_jax.vae import save_folder
from studies.beside_torch import __main__ as benchmark
from studies.beside_torch.workers import Worker
from tests.vae.conftest import TINY, random_parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    save_folder(path, TINY, random_parameters(TINY))
    return path


@pytest.mark.slow
def test_reports_rates_and_memory(folder, capsys):
    arguments = ["vae", f"--vae={folder}", "--image_size=32", "--batch_size=2", "--repeats=2", "--format=json"]
    assert benchmark.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["image_size"], report["batch_size"], report["dtype"]) == (32, 2, "float32")
    contestants = ["jax", "torch"] if find_spec("torch") and find_spec("diffusers") else ["jax"]
    for name in contestants:
        assert report[name]["encode_images_per_s"] > 0
        assert report[name]["decode_images_per_s"] > 0
        assert 50 < report[name]["peak_memory_mb"] < 10_000
    if "torch" in contestants:
        assert report["jax_over_torch"].keys() == {"encode", "decode"}
        assert max(report["relative_difference"].values()) < 1e-3


@pytest.mark.slow
def test_prints_a_table(folder, capsys):
    assert benchmark.main(["vae", f"--vae={folder}", "--image_size=16", "--repeats=1"]) == 0
    output = capsys.readouterr().out
    assert "16x16" in output
    assert "im/s" in output
    assert "peak memory" in output


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        (["--repeats=0"], InputError, "--repeats=0"),
        (["--image_size=18"], MPDiTError, "factor 4"),
        (["--vae=/no/such/folder"], WeightsError, "no such folder"),
    ],
)
def test_bad_input_is_one_sentence(folder, options, error, word):
    with pytest.raises(error, match=word):
        benchmark.main(["vae", f"--vae={folder}", *options])


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["vae", "--sizes=3"]])
def test_unknown_arguments_point_to_the_help(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(arguments)
    assert caught.value.code == 2
    assert "--help" in capsys.readouterr().err


def fail_to_set_up():
    raise MPDiTError("no such thing.")


def die_while_running():
    import os

    return {"die": lambda: os._exit(1)}, {}


def test_a_worker_that_fails_or_dies_is_reported():
    with pytest.raises(MPDiTError, match="one: no such thing"):
        Worker("one", fail_to_set_up)
    with Worker("two", die_while_running) as worker, pytest.raises(MPDiTError, match="two: its process died"):
        worker.time("die")
