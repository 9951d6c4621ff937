"""Real images to a VAE of our own, to latents, to a model, to pictures: every command as a user runs it."""

import json
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

from tests.tiny import ROOT, run, saved_arrays, start

CONFIG = f"--config={ROOT / 'configs/vae_fashion.py'}"
VAE = [
    "--config.data.image_size=16",
    "--config.batch_size=16",
    "--config.model.block_out_channels=8,8",
    "--config.model.latent_channels=2",
    "--config.model.norm_num_groups=4",
    "--config.log.every=20",
    "--config.checkpoint.every=20",
]
MODEL = [
    f"--config={ROOT / 'configs/fashion_latents.py'}",
    "--config.steps=20",
    "--config.batch_size=16",
    "--config.model.hidden_size=16",
    "--config.model.num_heads=2",
    "--config.model.depths=1,1",
    "--config.model.in_channels=2",
    "--config.log.every=10",
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    from sklearn import datasets

    root, found = tmp_path_factory.mktemp("digits"), datasets.load_digits()
    for index, (image, label) in enumerate(zip(found.images[:300], found.target, strict=False)):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).save(root / str(label) / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def vae(digits, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vae")
    arguments = [CONFIG, *VAE, f"--config.data.images={digits}", "--config.steps=160", f"--workdir={workdir}"]
    status, stdout, stderr = run("train_vae", arguments)
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
    # What the file says about the latents is true: their spread times the factor is one.
    assert 0.7 < float(np.asarray(mean).std()) * trained.scaling_factor < 1.3
    assert Image.open(vae / "reconstructions.png").width > 100


@pytest.mark.slow
def test_a_stopped_vae_continues_with_the_same_bits(digits, tmp_path):
    arguments = [CONFIG, *VAE, f"--config.data.images={digits}", "--config.steps=40"]
    assert run("train_vae", [*arguments, f"--workdir={tmp_path / 'whole'}"])[0] == 0
    process = start("train_vae", [*arguments, f"--workdir={tmp_path / 'parts'}"])
    deadline = time.monotonic() + 120
    while not (tmp_path / "parts/metrics.jsonl").exists() or not (tmp_path / "parts/metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "SIGTERM: saved step" in stdout
    assert run("train_vae", [*arguments, f"--workdir={tmp_path / 'parts'}"])[0] == 0
    weights = [tmp_path / part / "vae/diffusion_pytorch_model.safetensors" for part in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    status, _, stderr = run("train_vae", [*arguments, "--config.seed=1", f"--workdir={tmp_path / 'parts'}"])
    assert status == 1
    assert "of another config" in stderr
    assert "Traceback" not in stderr


@pytest.fixture(scope="module")
def latents(vae, digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "digits"
    arguments = [f"--images={digits}", f"--vae={vae / 'vae'}", "--image_size=16", "--shard_size=64", f"--out={out}"]
    status, stdout, stderr = run("prepare", arguments)
    assert status == 0, stderr
    assert "done: 300 latents 8x8x2" in stdout
    return out


@pytest.mark.slow
def test_several_processes_make_the_same_store(latents, vae, digits, tmp_path):
    out = tmp_path / "store"
    arguments = [f"--images={digits}", f"--vae={vae / 'vae'}", "--image_size=16", "--shard_size=64", f"--out={out}"]
    port = free_port()
    processes = [
        start(
            "prepare",
            [*arguments, f"--coordinator_address=localhost:{port}", "--num_processes=2", f"--process_id={index}"],
        )
        for index in range(2)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    names = {path.name for path in latents.iterdir()} - {".lock"}  # which says who held it last
    assert {path.name for path in out.iterdir()} - {".lock"} == names
    for name in names:
        assert (out / name).read_bytes() == (latents / name).read_bytes(), name


@pytest.mark.slow
def test_a_killed_prepare_continues_to_the_same_bytes(latents, vae, digits, tmp_path):
    out = tmp_path / "store"
    arguments = [f"--images={digits}", f"--vae={vae / 'vae'}", "--image_size=16", "--shard_size=64", f"--out={out}"]
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
    status, stdout, stderr = run("prepare", arguments)
    assert status == 0, stderr
    assert "are there already" in stdout
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == {
        path.name: path.read_bytes() for path in latents.iterdir() if path.name != ".lock"
    }


@pytest.mark.slow
def test_train_on_latents_and_draw(latents, vae, tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "samples.npz"
    shown = ["--config.sample.every=1000", "--config.sample.steps=2", f"--config.sample.vae={vae / 'vae'}"]
    status, stdout, stderr = run("train", [*MODEL, *shown, f"--config.data.path={latents}", f"--workdir={workdir}"])
    assert status == 0, stderr
    assert "--vae=FOLDER" in stdout
    [grid] = (workdir / "samples").iterdir()  # decoded, of the last step
    with Image.open(grid) as picture:
        assert picture.width > 8 * 16
        assert np.asarray(picture).std() > 1
    draw = [f"--workdir={workdir}", "--labels=3,5", "--num_samples=6", "--steps=4", f"--out={out}"]
    status, _, stderr = run("sample", draw)
    assert (status, "give --vae=FOLDER" in stderr) == (1, True)
    status, stdout, stderr = run("sample", [*draw, f"--vae={vae / 'vae'}", "--grid", "--trajectory"])
    assert status == 0, stderr
    with np.load(out) as archive:
        assert archive["arr_0"].shape == (6, 16, 16, 1)
        assert archive["arr_0"].std() > 1
    assert out.with_suffix(".png").is_file()
    # Eight devices draw the same: the VAE takes their latents too.
    status, _, stderr = run("sample", [*draw[:-1], f"--out={tmp_path / '8.npz'}", f"--vae={vae / 'vae'}"], devices=8)
    assert status == 0, stderr
    with np.load(out) as one, np.load(tmp_path / "8.npz") as eight:
        assert np.abs(one["arr_0"].astype(int) - eight["arr_0"]).max() <= 1
    wrong = json.loads((workdir / "data.json").read_text())
    wrong["latents"]["vae_fingerprint"] = "0" * 64
    (workdir / "data.json").write_text(json.dumps(wrong))
    status, _, stderr = run("sample", [*draw, f"--vae={vae / 'vae'}"])
    assert status == 1
    assert "give the VAE that encoded them" in stderr


@pytest.mark.slow
def test_a_training_on_latents_resumes_with_the_same_bits(latents, tmp_path):
    arguments = [*MODEL, f"--config.data.path={latents}", "--config.checkpoint.every=10"]
    assert run("train", [*arguments, f"--workdir={tmp_path / 'whole'}"])[0] == 0
    parts = [*arguments, f"--workdir={tmp_path / 'parts'}"]
    assert run("train", [*parts, "--config.steps=10"])[0] == 0
    assert run("train", parts)[0] == 0
    whole, both = (saved_arrays(tmp_path / name, 20) for name in ("whole", "parts"))
    assert whole.keys() == both.keys()
    assert all(array.tobytes() == both[path].tobytes() for path, array in whole.items())


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
