"""`python -m mpdit_jax.sample`: what it writes, what it refuses, and what it finishes after being killed."""

import os
import re
import signal
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import mpdit_jax as mp
from mpdit_jax import images
from mpdit_jax.errors import DivergedError, InputError
from mpdit_jax.sample import main
from mpdit_jax.sampling.command import parse_labels
from tests.sampling.conftest import read_npz, start
from tests.tiny import refusal

FEW = ["--steps=2", "--batch_size=4"]


def run(workdir, *arguments):
    return main([f"--workdir={workdir}", *FEW, *map(str, arguments)])


def test_npz(workdir, tmp_path):
    assert run(workdir, f"--out={tmp_path}/a.npz", "--num_samples=10", "--seed=3", "--guidance_scale=2") == 0
    found = read_npz(tmp_path / "a.npz")
    assert found["arr_0"].shape == (10, 8, 8, 1)
    assert found["arr_0"].dtype == np.uint8
    assert found["labels"].tolist() == list(range(10))
    latents = mp.make_sampler(steps=2, guidance_scale=2.0)(
        mp.load_checkpoint(workdir), np.arange(10), jax.random.key(3)
    )
    assert np.abs(images.to_uint8(np.asarray(latents)).astype(int) - found["arr_0"]).max() <= 1  # rounding
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_the_batch_size_does_not_matter(workdir, tmp_path):
    for size in (1, 3, 64):
        run(workdir, f"--out={tmp_path}/{size}.npz", "--num_samples=7", f"--batch_size={size}")
    one, three, many = (read_npz(tmp_path / f"{size}.npz")["arr_0"].astype(int) for size in (1, 3, 64))
    assert np.abs(one - three).max() <= 1
    assert np.abs(one - many).max() <= 1


def test_pictures(workdir, tmp_path):
    arguments = [f"--out={tmp_path}/a.png", "--labels=3,5", "--num_samples=6", f"--png_folder={tmp_path}/single"]
    assert run(workdir, *arguments, f"--grid={tmp_path}/sheet.png", "--trajectory", "--steps=12") == 0
    names = sorted(path.name for path in (tmp_path / "single").iterdir())
    assert names == [f"{i:06d}_{label}.png" for i, label in enumerate([3, 5] * 3)]
    plain, sheet = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("a.png", "sheet.png"))
    assert plain.shape[0] == sheet.shape[0]
    margin = sheet.shape[1] - plain.shape[1]
    assert np.array_equal(sheet[:, margin:], plain)  # the same pictures, names at the left
    assert (sheet[:, :margin] < 128).any()
    # Row 0 holds the 3s: images 0, 2, 4.
    first = np.asarray(Image.open(tmp_path / "single/000004_3.png"))
    assert np.array_equal(plain[2:42:5, 2 + 2 * 42 : 2 + 2 * 42 + 40 : 5], first)
    film = Image.open(tmp_path / "a_trajectory.gif")
    assert film.n_frames == 13
    assert Image.open(tmp_path / "a_trajectory.png").width == 10 * 42 + 2


def test_a_bare_grid_takes_the_place_of_the_picture(workdir, tmp_path):
    run(workdir, f"--out={tmp_path}/a.png", "--labels=1", "--grid")
    run(workdir, f"--out={tmp_path}/b.npz", "--labels=1", "--grid")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_class_names(workdir, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"name {i}" for i in range(10)))
    run(workdir, f"--out={tmp_path}/a.png", "--labels=1", "--grid", f"--class_names={tmp_path}/names.txt")
    run(workdir, f"--out={tmp_path}/b.png", "--labels=1", "--grid")
    assert Image.open(tmp_path / "a.png").width > Image.open(tmp_path / "b.png").width
    (tmp_path / "names.txt").write_text("one\n")
    with pytest.raises(InputError, match="has 1 names: this model has 10 classes"):
        run(workdir, f"--out={tmp_path}/c.png", "--grid", f"--class_names={tmp_path}/names.txt")


def test_labels():
    assert parse_labels("balanced", 12, 10, 0).tolist() == [*range(10), 0, 1]
    assert parse_labels("balanced", None, 10, 0).tolist() == [*range(10)] * 8
    assert parse_labels("7,2", 3, 10, 0).tolist() == [7, 2, 7]
    random = parse_labels("random", 1000, 10, 5)
    assert set(random) == set(range(10))
    assert np.array_equal(random[:300], parse_labels("random", 300, 10, 5))
    assert not np.array_equal(random, parse_labels("random", 1000, 10, 6))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_is_continued(workdir, tmp_path, signal_number):
    arguments = ["-m", "mpdit_jax.sample", f"--workdir={workdir}", "--steps=60", "--batch_size=4", "--num_samples=400"]
    expected, out = tmp_path / "expected.npz", tmp_path / "a.npz"
    blocks = tmp_path / "a.npz.unfinished"
    process = start(*arguments, f"--out={out}")
    while len(list(blocks.glob("*[0-9].npz"))) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    os.kill(process.pid, signal_number)
    process.wait()
    assert process.returncode != 0
    assert not out.exists()
    finished = {path: path.stat().st_mtime_ns for path in blocks.glob("*[0-9].npz")}
    assert 3 <= len(finished) < 100
    # Other settings are refused and leave everything as it is.
    with pytest.raises(InputError, match=r"a\.npz\.unfinished.*other settings \(steps: 60 there, 2 now\)"):
        main([f"--workdir={workdir}", f"--out={out}", "--steps=2", "--batch_size=4", "--num_samples=400"])
    kept = {}
    process = start(*arguments, f"--out={out}")
    while process.poll() is None and blocks.exists():
        kept |= {path: path.stat().st_mtime_ns for path in finished if path.exists()}
        time.sleep(0.005)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "of 400 images are there already" in text
    assert kept == finished  # nothing was drawn twice
    assert not blocks.exists()
    assert main([*arguments[2:], f"--out={expected}"]) == 0
    first, second = read_npz(out), read_npz(expected)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_nan_images_are_told_and_the_rest_kept(workdir, tmp_path, capsys, monkeypatch):
    from mpdit_jax.flow import sampler

    original = sampler.draw_noise

    def spoilt(key, indices, shape):
        return jax.numpy.where((indices == 5)[:, None, None, None], np.nan, original(key, indices, shape))

    monkeypatch.setattr(sampler, "draw_noise", spoilt)
    assert run(workdir, f"--out={tmp_path}/a.npz", "--num_samples=9", f"--png_folder={tmp_path}/single") == 1
    assert "image 5 (label 5) holds NaN or Inf; left out" in capsys.readouterr().err
    assert read_npz(tmp_path / "a.npz")["labels"].tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert len(list((tmp_path / "single").iterdir())) == 8
    with pytest.warns(UserWarning, match=r"picture 5 \(label 5\) holds NaN"):
        pictures = mp.generate(workdir, np.arange(7), steps=2)
    assert len(pictures) == 7
    assert np.asarray(pictures[5]).min() == 255


def test_a_diverged_model(workdir, tmp_path, monkeypatch):
    from mpdit_jax.flow import sampler

    monkeypatch.setattr(
        sampler, "draw_noise", lambda key, indices, shape: jax.numpy.full((len(indices), *shape), np.nan)
    )
    with pytest.raises(DivergedError, match="every image holds NaN"):
        run(workdir, f"--out={tmp_path}/a.npz", "--num_samples=4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--out=a.jpg"], "--out=a.jpg: expected a name that ends in .png or .npz"),
    (["--labels=11"], "label 11 is out of range"),
    (["--labels=three"], "--labels=three: expected balanced, random, or whole numbers"),
    (["--num_samples=0"], "--num_samples=0"),
    (["--batch_size=0"], "--batch_size=0"),
    (["--seed=-1"], "--seed=-1"),
    (["--steps=0"], "steps=0"),
    (["--guidance_scale=-1"], "guidance_scale=-1"),
    (["--guidance_interval=0.9,0.1"], r"guidance_interval=\(0.9, 0.1\)"),
    (["--guidance_interval=0.9"], "guidance_interval=.*expected two times"),
    (["--solver=eular"], "did you mean 'euler'"),
    (["--solver=dopri5"], "--steps=2: dopri5 chooses its own; set --rtol and --atol"),
    (["--rtol=1e-3"], "rtol=0.001 is not an option of solver 'euler'"),
    (["--time_shift=2"], "only --time_grid=shifted"),
    (["--negative_labels=3:99"], "negative label 99"),
    (["--guide=nowhere"], "nowhere holds no run"),
    (["--grid=a.jpg"], "--grid=a.jpg: expected a name that ends in .png"),
    (["--trajectory=a.png"], "--trajectory=a.png: expected a name that ends in .gif"),
    (["--precision=float16"], "precision='float16'"),
])  # fmt: skip
def test_bad_input_is_refused(workdir, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    everything = [f"--workdir={workdir}", *FEW, f"--out={tmp_path}/a.npz", *arguments]
    assert re.search(sentence, refusal(main, everything, monkeypatch, capsys))
    assert not list(tmp_path.iterdir())  # no output, and no folder of unfinished blocks


def test_a_missing_extra_is_told_before_anything_is_written(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    arguments = [f"--workdir={workdir}", f"--out={tmp_path}/a.npz", "--solver=tsit5", "--rtol=3e-3"]
    assert "mpdit_jax[adaptive]" in refusal(main, arguments, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


def test_a_model_of_latents_is_refused():
    from tests.flow.toys import GaussianModel

    with pytest.raises(InputError, match=r"draws latents \(1, 1, 4\).*decoded by the VAE"):
        mp.generate(GaussianModel(), [0, 1], steps=2)
    pictures = mp.generate(GaussianModel(), [0, 1], steps=2, decode=lambda z: jax.numpy.tanh(z[..., :3]))
    assert [picture.mode for picture in pictures] == ["RGB", "RGB"]


def test_generate(workdir):
    pictures = mp.generate(workdir, [3, 1, 4, 1, 5], steps=4, guidance_scale=[1.0, 2, 2, 2, 2], batch_size=2)
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (8, 8))] * 5
    model = mp.load_checkpoint(workdir)
    (alone,) = mp.generate(model, 3, steps=4)
    assert np.abs(np.asarray(alone, int) - np.asarray(pictures[0], int)).max() <= 1
    with pytest.raises(InputError, match="label 11 is out of range"):
        mp.generate(model, [11])


MANY_DEVICES = """
import json, sys
import jax, numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
import mpdit_jax as mp
from mpdit_jax.sample import main
workdir, out = sys.argv[1:]
assert jax.device_count() == 4
assert main([f"--workdir={workdir}", f"--out={out}", "--steps=2", "--batch_size=6", "--num_samples=10"]) == 0
model, sampler, key = mp.load_checkpoint(workdir), mp.make_sampler(steps=2, guidance_scale=2.0), jax.random.key(0)
mesh = jax.make_mesh((4,), ("devices",), (AxisType.Auto,))
structure, state = nnx.split(model)
draw = jax.shard_map(
    lambda state, labels, indices: sampler(nnx.merge(structure, state), labels, key, indices=indices),
    mesh=mesh, in_specs=(P(), P("devices"), P("devices")), out_specs=P("devices"),
)
found = np.asarray(jax.jit(draw)(state, np.arange(8), np.arange(8)))
expected = np.asarray(sampler(model, np.arange(8), key))
assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
print("fine")
"""


def test_many_devices_draw_the_same(workdir, tmp_path):
    process = start("-c", MANY_DEVICES, workdir, tmp_path / "four.npz", devices=4)
    text, _ = process.communicate()
    assert text.endswith("fine\n"), text
    run(workdir, f"--out={tmp_path}/one.npz", "--num_samples=10")
    one, four = (read_npz(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("one", "four"))
    assert np.abs(one - four).max() <= 1


MANY_PROCESSES = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from mpdit_jax.sample import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_two_processes_draw_the_same(workdir, tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = [f"--workdir={workdir}", "--steps=2", "--batch_size=4", "--num_samples=18"]
    processes = [start("-c", MANY_PROCESSES, address, i, *arguments, f"--out={tmp_path}/two.npz") for i in range(2)]
    texts = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    main([*arguments, f"--out={tmp_path}/one.npz"])
    one, two = read_npz(tmp_path / "one.npz"), read_npz(tmp_path / "two.npz")
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "two.npz"]
