"""Users' commands lead from real images to a VAE, to latents, to a model, to pictures.

Each command runs once as its own undisturbed process, and disturbed runs are compared with its result. Runs in this
process are compiled in the same way.
"""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from mpdit_jax import train_vae
from mpdit_jax.data.latent_store import read_manifest
from mpdit_jax.errors import CheckpointError
from mpdit_jax.io import pictures as images
from mpdit_jax.sample import __main__ as sample
from mpdit_jax.train import __main__ as train
from tests.tiny import ROOT, free_port, refusal, run, saved_arrays, start

CONFIG = f"--config={ROOT / 'configs/vae_fashion.py'}"
VAE = [
    "--config.data.image_size=16",
    "--config.batch_size=16",
    "--config.model.block_out_channels=8,8",
    "--config.model.latent_channels=2",
    "--config.model.norm_num_groups=4",
    "--config.steps=80",
    "--config.log.every=20",
    "--config.checkpoint.every=40",
]
MODEL = [
    f"--config={ROOT / 'configs/fashion_latents.py'}",
    "--config.steps=20",
    "--config.batch_size=16",
    "--config.model.hidden_size=16",
    "--config.model.num_heads=2",
    "--config.model.depths=1,1",
    "--config.model.in_channels=2",
    "--config.model.time_embedding=sinusoidal",  # compiles in half the time
    "--config.log.every=10",
    "--config.checkpoint.every=10",
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    from sklearn import datasets

    root, found = tmp_path_factory.mktemp("digits"), datasets.load_digits()
    for index, (image, label) in enumerate(zip(found.images[:300], found.target, strict=False)):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).save(root / str(label) / f"{index}.png")
    return root


def vae_arguments(digits, workdir):
    return [CONFIG, *VAE, f"--config.data.images={digits}", f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def vae(digits, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vae")
    status, stdout, stderr = run("train_vae", vae_arguments(digits, workdir))
    assert status == 0, stderr
    assert str(workdir / "vae") in stdout
    return workdir


@pytest.mark.slow
def test_the_vae_learns_to_reconstruct(vae, digits):
    from mpdit_jax.vae import load_vae

    trained = load_vae(vae / "vae")
    files = sorted(digits.rglob("*.png"))[::10]
    images = np.stack([np.asarray(Image.open(path).resize((16, 16), Image.Resampling.BICUBIC)) for path in files])
    x = images[..., None].astype(np.float32) / 127.5 - 1
    mean, _ = trained.encode(x)
    error = np.abs(np.asarray(trained.decode(mean)) - x).mean()
    constant = np.abs(x - np.median(x)).mean()  # the best that one number can do
    assert error < 0.5 * constant
    # The VAE's scaling_factor is true: the latents' spread times the factor is one.
    assert 0.7 < float(np.asarray(mean).std()) * trained.scaling_factor < 1.3
    assert Image.open(vae / "reconstructions.png").width > 100


@pytest.mark.slow
def test_a_stopped_vae_continues_with_the_same_bits(vae, digits, tmp_path):
    arguments = vae_arguments(digits, tmp_path)
    process = start("train_vae", arguments)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "SIGTERM: saving step" in stdout
    assert "saved; continue with:\n  " in stdout
    assert train_vae.main(arguments) == 0
    weights = [workdir / "vae/diffusion_pytorch_model.safetensors" for workdir in (vae, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(CheckpointError, match=r"holds a run of another config:\n  config.seed: 0 in the run, 1 now"):
        train_vae.main([*arguments, "--config.seed=1"])


def prepare_arguments(vae, digits, out):
    sizes = ("--image_size=16", "--shard_size=64", "--flip=both")
    return [f"--images={digits}", f"--vae={vae / 'vae'}", *sizes, f"--out={out}"]


@pytest.fixture(scope="module")
def latents(vae, digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "digits"
    status, stdout, stderr = run("prepare", prepare_arguments(vae, digits, out))
    assert status == 0, stderr
    assert "done: 300 latents 8x8x2" in stdout
    assert read_manifest(out).views == 2
    return out


@pytest.mark.slow
def test_a_killed_prepare_is_finished_by_two_processes_to_the_same_bytes(latents, vae, digits, tmp_path):
    out = tmp_path / "store"
    arguments = prepare_arguments(vae, digits, out)
    process = start("prepare", arguments)
    deadline = time.monotonic() + 120
    while not list(out.glob(".shard-00000*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (out / "manifest.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-00000*")}
    cluster = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    processes = [start("prepare", [*arguments, *cluster, f"--process_id={index}"]) for index in range(2)]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "are there already" in said[0][0]
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == {
        path.name: path.read_bytes()
        for path in latents.iterdir()
        if path.name != ".lock"  # which says who held it
    }


@pytest.fixture(scope="module")
def trained(latents, vae, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    shown = ["--config.sample.every=1000", "--config.sample.steps=2", f"--config.sample.vae={vae / 'vae'}"]
    arguments = [*MODEL, *shown, f"--config.data.path={latents}", f"--workdir={workdir}"]
    status, stdout, stderr = run("train", arguments)
    assert status == 0, stderr
    assert f" --vae={vae / 'vae'} " in stdout
    return workdir


@pytest.mark.slow
def test_what_was_trained_is_drawn(trained, vae, tmp_path, monkeypatch, capsys):
    [grid] = (trained / "samples").iterdir()  # the decoded grid of the last step
    with Image.open(grid) as picture:
        assert picture.width > 8 * 16
        assert np.asarray(picture).std() > 1
    draw, decoded = [f"--workdir={trained}", "--labels=3,5", "--num_samples=6", "--steps=2"], f"--vae={vae / 'vae'}"
    status, _, stderr = run("sample", [*draw, decoded, "--grid", "--trajectory", f"--out={tmp_path / '1.npz'}"])
    assert status == 0, stderr
    with np.load(tmp_path / "1.npz") as archive:
        drawn, labels = archive["arr_0"], archive["labels"]
    assert drawn.shape == (6, 16, 16, 1)
    assert drawn.std() > 1
    with Image.open(tmp_path / "1.png") as sheet:  # three images a class, with their names
        assert sheet.width > 3 * 16
        assert sheet.height > 2 * 16
    # Eight devices draw the same images, decoded by the VAE; the PNG has them in one row a class.
    status, _, stderr = run("sample", [*draw, decoded, f"--out={tmp_path / '8.png'}"], devices=8)
    assert status == 0, stderr
    expected = images.grid(drawn[np.argsort(labels, kind="stable")], 3)[..., 0]
    with Image.open(tmp_path / "8.png") as picture:
        found = np.asarray(picture.convert("L"))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1
    out = f"--out={tmp_path / 'none.npz'}"
    assert "give --vae=FOLDER" in refusal(sample.main, [*draw, out], monkeypatch, capsys)
    other = shutil.copytree(trained, tmp_path / "run")
    wrong = json.loads((other / "data.json").read_text())
    wrong["latents"]["vae_fingerprint"] = "0" * 64
    (other / "data.json").write_text(json.dumps(wrong))
    arguments = [f"--workdir={other}", *draw[1:], decoded, out]
    assert "give the VAE that encoded them" in refusal(sample.main, arguments, monkeypatch, capsys)


@pytest.mark.slow
def test_a_training_on_latents_resumes_with_the_same_bits(trained, latents, tmp_path):
    arguments = [*MODEL, f"--config.data.path={latents}", f"--workdir={tmp_path}"]
    assert train.main([*arguments, "--config.steps=10"]) == 0
    assert train.main(arguments) == 0
    whole, parts = (saved_arrays(workdir, 20) for workdir in (trained, tmp_path))
    assert whole.keys() == parts.keys()
    assert all(array.tobytes() == parts[path].tobytes() for path, array in whole.items())
