import re

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mpdit_jax as mp
from mpdit_jax.errors import CheckpointError
from mpdit_jax.sample import __main__ as sample
from tests.tiny import refusal, run, train_arguments


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "run"
    status, _, stderr = run("train", train_arguments(folder, "--config.sample.every=4", "--config.sample.steps=2"))
    assert status == 0, stderr
    return folder


def draw(workdir, out, *more):
    assert sample.main([f"--workdir={workdir}", f"--out={out}", "--steps=3", *more]) == 0


def test_help_says_how(capsys):
    with pytest.raises(SystemExit) as done:
        sample.main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    for part in ("--workdir", "--labels", "--guidance_scale", "--seed", "examples:", "runs/digits"):
        assert part in text


@pytest.mark.slow
def test_training_draws_grids(workdir):
    for step in (4, 8):
        assert Image.open(workdir / "samples" / f"{step:08d}.png").size == (8 * 42 + 2, 10 * 42 + 2)
    events = EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    assert [(image.step, image.width) for image in events.Images("samples")] == [(4, 338), (8, 338)]


def test_npz_is_what_adm_reads(workdir, tmp_path):
    draw(workdir, tmp_path / "out.npz", "--labels=3,5", "--num_samples=5", "--guidance_scale=2.0")
    with np.load(tmp_path / "out.npz") as archive:
        assert archive.files == ["arr_0", "labels"]
        assert archive["arr_0"].shape == (5, 8, 8, 1)
        assert archive["arr_0"].dtype == np.uint8
        assert archive["labels"].tolist() == [3, 5, 3, 5, 3]


def test_image_i_depends_on_seed_and_i_alone(workdir, tmp_path):
    common = ["--labels=1,2,3", "--seed=7"]
    draw(workdir, tmp_path / "a.npz", "--num_samples=7", "--batch_size=7", *common)
    draw(workdir, tmp_path / "b.npz", "--num_samples=5", "--batch_size=2", *common)
    draw(workdir, tmp_path / "c.npz", "--num_samples=5", "--batch_size=5", "--labels=1,2,3", "--seed=8")
    a, b, c = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in "abc")
    assert abs(a[:5] - b).max() <= 1  # rounding to uint8 may fall either way
    assert abs(a[:5] - c).max() > 20


def test_png_has_one_row_a_label(workdir, tmp_path):
    draw(workdir, tmp_path / "grid.png", "--labels=3,5", "--num_samples=6")
    picture = Image.open(tmp_path / "grid.png")
    assert picture.size == (3 * 42 + 2, 2 * 42 + 2)
    draw(workdir, tmp_path / "grid.npz", "--labels=3,5", "--num_samples=6")
    images = np.load(tmp_path / "grid.npz")["arr_0"]
    pixels = np.asarray(picture)
    assert np.array_equal(pixels[2:42:5, 44:84:5], images[2, :, :, 0])  # row of 3s, second
    assert np.array_equal(pixels[44:84:5, 2:42:5], images[1, :, :, 0])  # row of 5s, first


def test_ema_and_steps(workdir):
    first, last = (mp.load_checkpoint(workdir, step=step) for step in (4, None))
    raw = mp.load_checkpoint(workdir, ema=False)
    name = "final_layer.linear.bias"
    values = [mp.to_torch(model)[name][0].item() for model in (first, last, raw)]
    assert len(set(values)) == 3


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--labels=11"], r"label 11 is out of range.*0 to 9"),
    (["--labels=-1"], "label -1 is out of range"),
    (["--labels=3,x"], "--labels=3,x: no class is called 'x'; expected .*indices"),
    (["--num_samples=0"], "--num_samples=0"),
    (["--steps=0"], "steps=0"),
    (["--guidance_scale=-1"], r"guidance_scale=-1\.0"),
    (["--guidance_scale=nan"], "guidance_scale=nan"),
    (["--out=grid.jpg"], r"\.png or \.npz"),
    (["--step=5"], "no checkpoint of step 5; there are 4, 8"),
])  # fmt: skip
def test_wrong_arguments(workdir, tmp_path, monkeypatch, capsys, arguments, sentence):
    everything = [f"--workdir={workdir}", f"--out={tmp_path / 'x.png'}", *arguments]
    assert re.search(sentence, refusal(sample.main, everything, monkeypatch, capsys))
    assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_empty_workdir(tmp_path):
    status, _, stderr = run("sample", [f"--workdir={tmp_path}", "--out=x.png"])
    assert status == 1
    assert f"{tmp_path} holds no run" in stderr
    assert "mpdit_jax.train" in stderr
    assert len(stderr.splitlines()) == 1


def test_unwritable_output(workdir, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "x.png", tmp_path / "folder.png"):
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        arguments = [f"--workdir={workdir}", f"--out={out}"]
        assert "cannot write" in refusal(sample.main, arguments, monkeypatch, capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    from mpdit_jax.io.atomic import atomic_write

    path = tmp_path / "kept"
    path.write_bytes(b"old")

    def write_half():
        with atomic_write(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_checkpoint_without_config_is_not_adopted(workdir, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "config.json").unlink()
    status, _, stderr = run("train", train_arguments(copy))
    assert status == 1
    assert "has checkpoints but no config.json" in stderr
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        mp.load_checkpoint(copy)
