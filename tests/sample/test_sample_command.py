"""`python -m mpdit_jax.sample` writes its outputs and refuses bad input; `mpdit_jax.generate` does the same."""

import json
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mpdit_jax as mp
from mpdit_jax.errors import DataWarning, DivergedError, InputError
from mpdit_jax.io import pictures as images
from mpdit_jax.sample.__main__ import main, make_sample_parser
from mpdit_jax.sample.blocks import Block
from mpdit_jax.sample.classes import Classes, read_classes
from mpdit_jax.sample.drawing import Drawing
from mpdit_jax.sample.labels import balanced_labels, parse_labels
from mpdit_jax.sample.options import reject_unused_flags
from mpdit_jax.sample.outputs import first_of_each
from mpdit_jax.sample.trajectory import save_trajectory
from tests.sample.conftest import FEW, make_workdir, read_npz, run
from tests.tiny import refusal


def test_npz(workdir, tmp_path, capsys):
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
    # In a log the first and the last block have a line, and the first has no rate yet.
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sampling")]
    assert lines[0] == "sampling 4/10 images"
    assert re.fullmatch(r"sampling 10/10 images  [\d.e+]+/s  0:00:00 left", lines[-1])


def test_the_batch_size_does_not_matter(workdir, tmp_path):
    for size in (1, 3, 64):
        run(workdir, f"--out={tmp_path}/{size}.npz", "--num_samples=7", f"--batch_size={size}")
    one, three, many = (read_npz(tmp_path / f"{size}.npz")["arr_0"].astype(int) for size in (1, 3, 64))
    assert np.abs(one - three).max() <= 1
    assert np.abs(one - many).max() <= 1


@pytest.mark.slow
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


def test_a_contact_sheet_keeps_classes_of_one_name(workdir, tmp_path):
    """ImageNet has two classes called crane."""
    (tmp_path / "names.txt").write_text("crane\n" * 10)
    arguments = [f"--out={tmp_path}/a.npz", "--labels=1,2,3", "--num_samples=3", "--grid"]
    run(workdir, *arguments, f"--class_names={tmp_path}/names.txt")
    assert Image.open(tmp_path / "a.png").height == 3 * 42 + 2


def test_a_contact_sheet_keeps_no_image_that_it_does_not_show():
    labels = np.tile(np.arange(120), 10)
    blocks = [
        Block(
            np.full((100, 8, 8, 1), number, np.uint8), labels[100 * number :][:100], np.arange(100), np.ones(100, bool)
        )
        for number in range(12)
    ]
    rows = first_of_each(blocks, labels)
    assert [*rows] == [*range(100)]
    assert {len(row) for row in rows.values()} == {8}
    assert rows[20][1][0, 0, 0] == 1  # image 140
    assert all(image.base is None for row in rows.values() for image in row)  # no view that keeps a block


def test_a_picture_has_room_for_a_limited_number_of_classes(workdir, tmp_path, monkeypatch, capsys):
    for module in ("command", "outputs"):
        monkeypatch.setattr(f"mpdit_jax.sample.{module}.ROWS", 3)
    with pytest.raises(InputError, match=r"a\.png: a picture has a row for each of up to 3 classes, and there are 4"):
        run(workdir, f"--out={tmp_path}/a.png", "--labels=0,1,2,4")
    assert not list(tmp_path.iterdir())
    assert run(workdir, f"--out={tmp_path}/a.npz", "--labels=0,1,2,4", "--num_samples=8", "--grid") == 0
    assert f"{tmp_path}/a.png shows 6 of 8 images, of 3 of 4 classes\n" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [
    ["--out=q.png", "--trajectory=q.gif"],
    ["--out=q.npz", "--grid", "--trajectory=q.gif"],
    ["--out=000001_2.png", "--png_folder=."],
])  # fmt: skip
def test_no_output_overwrites_another(workdir, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"where another output goes|has the name of a single image"):
        run(workdir, "--labels=1", *arguments)
    assert not list(tmp_path.iterdir())


def test_single_images_of_two_runs_do_not_mix(workdir, tmp_path, monkeypatch):
    singles = tmp_path / "single"
    arguments = [f"--out={tmp_path}/a.npz", "--labels=1", "--num_samples=6", f"--png_folder={singles}"]
    with monkeypatch.context() as patched:  # killed between an image and its block
        patched.setattr("mpdit_jax.sample.blocks.BlockFolder.write", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            run(workdir, *arguments)
    assert len(list(singles.iterdir())) == 4
    assert run(workdir, *arguments) == 0
    before = {path: path.read_bytes() for path in singles.iterdir()}
    with pytest.raises(InputError, match=r"single holds single images already, such as 00000\d_1\.png: give an empty"):
        run(workdir, *arguments, "--num_samples=2")
    assert {path: path.read_bytes() for path in singles.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "single"]


def test_a_film_decodes_only_the_frames_it_shows(workdir, tmp_path):
    decoded = []

    def decode(latents):
        decoded.append(latents.shape)
        return latents

    sampler, model = mp.make_sampler(steps=150), mp.load_checkpoint(workdir)
    drawing = Drawing(sampler, model, np.array([1, 2, 1]), 0, 64, decode)
    save_trajectory(drawing, tmp_path / "a.gif", tmp_path / "a.png")
    assert set(decoded) == {(2, 8, 8, 1)}
    assert 60 <= len(decoded) <= 70
    assert Image.open(tmp_path / "a.gif").n_frames == 60


def test_images_do_not_depend_on_the_default_key_implementation(workdir, tmp_path):
    run(workdir, f"--out={tmp_path}/a.npz", "--num_samples=4")
    with jax.default_prng_impl("rbg"):
        run(workdir, f"--out={tmp_path}/b.npz", "--num_samples=4")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


TEN = Classes(("zero", "one", "two", "three", "four", "five", "six", "7,a", "8-9", "Nine lives"))


def test_labels():
    assert parse_labels("balanced", 12, TEN, 0).tolist() == [*range(10), 0, 1]
    assert parse_labels("balanced", None, TEN, 0).tolist() == [*range(10)] * 8
    assert parse_labels("balanced", 10, TEN, 0).tolist() == [*range(10)]
    spread = parse_labels("balanced", 4, TEN, 0)  # not the first four: ImageNet's are all fish
    assert (spread.dtype, spread.tolist()) == (np.int64, [0, 2, 5, 7])
    assert spread.tolist() == balanced_labels(np.arange(10), 4).tolist()  # evaluations in training draw the same
    assert parse_labels("7,2", 3, TEN, 0).tolist() == [7, 2, 7]
    random = parse_labels("random", 1000, TEN, 5)
    assert set(random) == set(range(10))
    assert np.array_equal(random[:300], parse_labels("random", 300, TEN, 5))
    assert not np.array_equal(random, parse_labels("random", 1000, TEN, 6))


@pytest.mark.parametrize(("labels", "expected"), [
    ("3", [3]), ("0-3", [0, 1, 2, 3]), ("three", [3]), ("THREE, 1,two", [3, 1, 2]), ("5-5,null", [5, 10]),
    ("7,a", [7]), ("8-9", [8, 9]), ("nine lives", [9]), (3, [3]), ([3, "null", "one"], [3, 10, 1]),
    (jnp.array([0, 9]), [0, 9]),
])  # fmt: skip
def test_labels_by_index_range_and_name(labels, expected):
    assert TEN.find(labels, "labels").tolist() == expected


@pytest.mark.parametrize(("labels", "sentence"), [
    ("10", "labels: label 10 is out of range: this model has classes 0 to 9, and the null class is written null"),
    (10, "labels: label 10 is out of range: .* null class is written null"),
    ("-1", "label -1 is out of range"),
    ([-1], "label -1 is out of range"),
    ("1-10", "label 10 is out of range"),
    ("3-1", "no class is called '3-1'"),
    ("thre", r"labels=thre: no class is called 'thre' \(did you mean 'three'\?\); expected null, or indices, ranges"),
    ("1,,2", "no class is called ''"),
    ([1.5], "labels of shape .*expected whole numbers"),
    ([], "labels of shape"),
])  # fmt: skip
def test_labels_that_no_class_has(labels, sentence):
    with pytest.raises(InputError, match=sentence):
        TEN.find(labels, "labels")


def test_classes_without_training_examples_are_drawn_by_name_alone(capsys):
    classes = Classes(("cat", "dog", "eel"), unseen=(1,))
    assert parse_labels("balanced", 4, classes, 0).tolist() == [0, 2, 0, 2]
    assert set(parse_labels("random", 50, classes, 0)) == {0, 2}
    assert "leaves out classes without training examples: 1 (dog)\n" in capsys.readouterr().out
    with pytest.warns(DataWarning, match=r"1 \(dog\): no training examples"):
        assert parse_labels("dog,cat", 2, classes, 0).tolist() == [1, 0]
    assert classes.find_pairs({"cat": "null", "2": "0"}, "--negative_labels") == {0: 3, 2: 0}
    with pytest.raises(InputError, match="--negative_labels: 0,2 is more than one class"):
        classes.find_pairs({"0": "0,2"}, "--negative_labels")


def test_classes_without_examples_come_from_the_record_of_the_runs_data(tmp_path):
    record = {"class_names": ["cat", "dog", "eel"], "latents": None, "labels": None, "unseen": [1]}
    (tmp_path / "data.json").write_text(json.dumps(record))
    classes = read_classes(tmp_path, SimpleNamespace(model=SimpleNamespace(num_classes=4)))
    assert classes == Classes(("cat", "dog", "eel", "class 3"), unseen=(1, 3))
    assert balanced_labels(classes.seen(), 3).tolist() == [0, 2, 0]


def test_nan_images_are_named_and_the_rest_kept(workdir, tmp_path, capsys, monkeypatch):
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
    (["--labels=10"], "--labels: label 10 is out of range: .* the null class is written null"),
    (["--labels=three"], "--labels=three: no class is called 'three'; expected balanced, random, null, or indices"),
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
    (["--negative_labels=3:99", "--guidance_scale=2"], "--negative_labels: label 99 is out of range"),
    (["--guide=nowhere", "--guidance_scale=2"], "nowhere holds no run"),
    (["--guide=tail", "--guidance_scale=2"], "was not trained with config.trunk_drop"),
    (["--guide=nowhere"], "--guide is given and nothing is guided at --guidance_scale=1"),
    (["--negative_labels=3:8"], "--negative_labels is given and nothing is guided"),
    (["--guidance_interval=0.2,0.8"], "--guidance_interval is given and nothing is guided"),
    (["--grid=a.jpg"], "--grid=a.jpg: expected a name that ends in .png"),
    (["--trajectory=a.png"], "--trajectory=a.png: expected a name that ends in .gif"),
    (["--precision=float16"], "precision='float16'"),
])  # fmt: skip
def test_bad_input_is_refused(workdir, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    everything = [f"--workdir={workdir}", *FEW, f"--out={tmp_path}/a.npz", *arguments]
    assert re.search(sentence, refusal(main, everything, monkeypatch, capsys))
    assert not list(tmp_path.iterdir())  # no output, and no folder of unfinished blocks


def test_a_time_grid_needs_a_solver_of_fixed_steps(workdir, tmp_path, monkeypatch, capsys):
    arguments = [f"--workdir={workdir}", f"--out={tmp_path}/a.npz", "--solver=dopri5", "--time_grid=shifted"]
    assert "--time_grid=shifted: dopri5 chooses its own times" in refusal(main, arguments, monkeypatch, capsys)


def test_a_flag_must_have_an_effect_on_one_of_several_settings():
    options = make_sample_parser().parse_args(["--workdir=a", "--out=a.npz", "--negative_labels=1:2"])
    options.time_grid = "shifted"
    options.guidance_scale, options.solver = [1.0, 1.5], ["dopri5", "euler"]  # as `evaluate` has them
    reject_unused_flags(options)
    options.guidance_scale = [1.0, 1.0]
    with pytest.raises(InputError, match="--negative_labels is given"):
        reject_unused_flags(options)
    options.negative_labels, options.time_grid, options.steps, options.solver = {}, "uniform", [50], ["dopri5", "tsit5"]
    with pytest.raises(InputError, match=r"--steps=\[50\]: dopri5 chooses its own"):
        reject_unused_flags(options)


def test_a_run_on_latents_without_a_record_of_its_data(tmp_path):
    workdir = make_workdir(tmp_path / "run", in_channels=4)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["name"] = "latents"
    (workdir / "config.json").write_text(json.dumps(config))
    for vae in ([], ["--vae=sd-vae"]):
        with pytest.raises(InputError, match=r"does not record how its latents are normalized, .*convert"):
            run(workdir, f"--out={tmp_path}/a.npz", *vae)


def test_a_missing_extra_is_refused_before_anything_is_written(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    arguments = [f"--workdir={workdir}", f"--out={tmp_path}/a.npz", "--solver=tsit5", "--rtol=3e-3"]
    assert "extra [adaptive]" in refusal(main, arguments, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


def test_a_model_of_latents_is_refused():
    from tests.flow.toys import GaussianModel

    with pytest.raises(InputError, match=r"draws latents \(1, 1, 4\).*decoded by the VAE"):
        mp.generate(GaussianModel(), [0, 1], steps=2)
    pictures = mp.generate(GaussianModel(), [0, 1], steps=2, decode=lambda z: jax.numpy.tanh(z[..., :3]))
    assert [picture.mode for picture in pictures] == ["RGB", "RGB"]
    for wrong in (lambda z: z[..., :2], lambda z: jax.numpy.zeros((2, 1, 1, 3), np.uint8)):
        with pytest.raises(InputError, match=r"decoded pictures are .*: expected floats in \[-1, 1\] of shape"):
            mp.generate(GaussianModel(), [0, 1], steps=2, decode=wrong)
    with pytest.raises(InputError, match="guide=str: expected an MPDiT"):
        mp.generate(GaussianModel(), [0, 1], steps=2, decode=jnp.tanh, guidance_scale=2.0, guide="runs/weak")


def test_generate(workdir):
    pictures = mp.generate(workdir, [3, 1, 4, 1, 5], steps=4, guidance_scale=[1.0, 2, 2, 2, 2], batch_size=2)
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (8, 8))] * 5
    model = mp.load_checkpoint(workdir)
    (alone,) = mp.generate(model, 3, steps=4)
    assert np.abs(np.asarray(alone, int) - np.asarray(pictures[0], int)).max() <= 1
    with pytest.raises(InputError, match="label 11 is out of range"):
        mp.generate(model, [11])
    for seed in (-1, 2**32, 1.5, "x"):
        with pytest.raises(InputError, match=f"seed={seed!r}: expected a whole number from 0 to 4294967295"):
            mp.generate(model, [1], seed=seed)
    negatives, each = [2, 3, 4], {"steps": 4, "guidance_scale": [2.0, 2, 2], "batch_size": 2}
    first, second = (mp.generate(model, [3, 1, 5], negative_labels=of(negatives), **each) for of in (list, jnp.array))
    assert np.array_equal(first, second)
    assert len(mp.generate(model, "0-1,null", steps=1)) == 3
    with pytest.raises(InputError, match="2 negative labels for 3 labels"):
        mp.generate(model, [3, 1, 5], negative_labels=[2, 3])


def test_a_run_without_label_dropout_is_not_guided(tmp_path, capsys):
    """Commands refuse before they draw. The run's own grids are drawn without guidance, and the start says so."""
    from mpdit_jax import export
    from mpdit_jax.checkpoint.load import load_config
    from mpdit_jax.data.sources import load_digits
    from mpdit_jax.distributed.mesh import make_mesh
    from mpdit_jax.evaluate.__main__ import make_evaluate_parser
    from mpdit_jax.evaluate.runs import prepare_run
    from mpdit_jax.model.parameters import split
    from mpdit_jax.train.grid import draw_grid
    from mpdit_jax.train.startup import log_startup

    workdir = make_workdir(tmp_path / "run", label_dropout=0.0)
    options = [f"--workdir={workdir}", "--num_samples=4", "--batch_size=4", "--steps=1"]
    evaluation = make_evaluate_parser().parse_args([*options, "--guidance_scale=1.0,2.0"])
    for refused in (
        lambda: main([*options, "--guidance_scale=2", f"--out={tmp_path}/a.npz"]),
        lambda: export.main([options[0], "--guidance_scale=2", f"--out={tmp_path}/a.bin"]),
        lambda: prepare_run(evaluation, SimpleNamespace(image_shape=None), ()),
        lambda: mp.generate(workdir, "null", steps=1),
    ):
        with pytest.raises(InputError, match="null class, label 10, was not trained"):
            refused()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    config, mesh, (structure, parameters) = load_config(workdir), make_mesh(), split(mp.load_checkpoint(workdir))
    with jax.set_mesh(mesh):
        assert draw_grid(config, structure, None, np.arange(10), parameters, lambda: False) is not None
        log_startup(config, workdir, 0, load_digits(), mesh, None, False)
    said = "grids are drawn without guidance (config.sample.guidance_scale=1.5), since config.label_dropout=0 trains no"
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_generate_decodes_what_a_run_was_trained_on(tmp_path):
    """A store's pixels need no VAE, and latents need the VAE that data.json names."""
    workdir = make_workdir(tmp_path / "run", in_channels=3)
    space = {"mean": [-0.5, 0.0, 0.5], "std": [0.2, 0.2, 0.2], "vae_fingerprint": "pixels"}
    facts = {"class_names": [str(label) for label in range(10)], "latents": space, "labels": None}
    (workdir / "data.json").write_text(json.dumps(facts))
    assert run(workdir, f"--out={tmp_path}/a.npz", "--labels=1,2", "--num_samples=2") == 0
    drawn = np.stack([np.asarray(picture) for picture in mp.generate(workdir, [1, 2], steps=2)])
    assert np.abs(read_npz(tmp_path / "a.npz")["arr_0"].astype(int) - drawn).max() <= 1
    raw = mp.generate(workdir, [1, 2], steps=2, decode=lambda latents: latents)
    assert not np.array_equal(raw, drawn)
    for vae in (tmp_path, "sd-vae"):
        with pytest.raises(InputError, match=rf"--vae={vae}: {workdir} is a run on pixels, which needs no VAE: leave"):
            run(workdir, f"--out={tmp_path}/b.npz", f"--vae={vae}")
    space["vae_fingerprint"] = "ab" * 32
    (workdir / "data.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="was trained on latents: give vae=FOLDER, the VAE they come from"):
        mp.generate(workdir, [1, 2], steps=2)
    with pytest.raises(InputError, match="vae=sd: it belongs to the folder of a run"):
        mp.generate(mp.load_checkpoint(workdir), [1], vae="sd")
