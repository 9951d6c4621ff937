"""`python -m mpdit_jax.evaluate` takes every kind of set and refuses every kind of bad input."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from mpdit_jax.data.image_sets import open_npz, open_set
from mpdit_jax.errors import InputError
from mpdit_jax.evaluate import __main__ as evaluate
from mpdit_jax.evaluate import command, inception_weights
from mpdit_jax.evaluate.bias import describe_bias, perfect_distance
from mpdit_jax.evaluate.classifier import ClassifierConfig, initialize, save_classifier
from mpdit_jax.evaluate.compute import compute_statistics
from mpdit_jax.evaluate.report import make_result
from mpdit_jax.evaluate.scratch import lock_scratch
from mpdit_jax.evaluate.statistics import compare
from mpdit_jax.evaluate.stored_statistics import load_statistics, save_statistics
from mpdit_jax.sample.__main__ import main as sample
from tests.evaluate.conftest import collect
from tests.sample.conftest import make_workdir
from tests.tiny import refusal


@pytest.fixture(scope="module")
def files(tmp_path_factory, digits):
    """Return a folder with samples.npz, compressed.npz and a folder of images."""
    folder, images = tmp_path_factory.mktemp("sets"), digits[0]
    np.savez(folder / "samples.npz", arr_0=images[:600], labels=digits[1][:600])
    np.savez_compressed(folder / "compressed.npz", arr_0=images[:600])
    (folder / "images" / "a").mkdir(parents=True)
    for index, image in enumerate(images[:40]):
        place = folder / "images" / ("a" if index % 2 else ".") / f"{index:03}.png"
        Image.fromarray(image[..., 0]).save(place)
    return folder


def run(capsys, *arguments):
    assert evaluate.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_table_and_json_with_every_setting_that_changes_the_number(files, classifier_file, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    common = [f"--features=classifier:{classifier_file}", "--reference=data:digits", f"--out={out}"]
    said = run(capsys, f"--samples={files / 'samples.npz'}", "--metrics=fd,is,precision,recall,kid", *common)
    header = next(line for line in said.splitlines() if "FD" in line)
    assert header.split() == [
        "FD(classifier)", "IS(classifier)", "IS(classifier)", "std", "precision(classifier)", "recall(classifier)",
        "KD(classifier)", "KD(classifier)", "std",
    ]  # fmt: skip
    assert "FID" not in said
    (row,) = json.loads(out.read_text())["results"]
    assert row["metrics"]["precision(classifier)"] == 1.0  # they are part of the reference
    settings = row["settings"]
    assert settings["extractor"].keys() >= {"name", "fingerprint", "input", "precision"}
    assert settings["samples"]["count"] == 600
    assert settings["reference"]["count"] == 1797
    assert settings.keys() >= {"k", "splits", "seed", "version", "jax", "platform"}
    assert not out.with_name("numbers.json.unfinished").exists()


def test_the_same_images_in_every_form_give_the_same_number(files, classifier_file, tmp_path, capsys, digits):
    few = tmp_path / "few.npz"
    # In the order of the folder's names.
    names = sorted(p.relative_to(files / "images").as_posix() for p in (files / "images").rglob("*.png"))
    np.savez(few, arr_0=digits[0][[int(name[-7:-4]) for name in names]])
    rows = []
    for place in (few, files / "images"):
        out = tmp_path / f"{place.name}.json"
        arguments = (f"--features=classifier:{classifier_file}", "--reference=data:digits", "--metrics=fd")
        said = run(capsys, f"--samples={place}", f"--out={out}", *arguments)
        assert "warning: 40 samples are fewer than the 64 features" in said
        rows.append(json.loads(out.read_text())["results"][0])
    assert rows[0]["metrics"] == rows[1]["metrics"]
    assert 0 < rows[0]["settings"]["distance_of_a_perfect_model"]["FD(classifier)"] < 20
    np.testing.assert_array_equal(open_npz(files / "compressed.npz").images, open_npz(files / "samples.npz").images)
    assert isinstance(open_npz(files / "samples.npz").images, np.memmap)


def test_statistics_are_kept_and_compared_with(files, classifier_file, tmp_path, capsys):
    stats, features = tmp_path / "stats.npz", f"--features=classifier:{classifier_file}"
    run(
        capsys,
        "--samples=data:digits",
        features,
        f"--save_stats={stats}",
        "--save_features",
        f"--out={tmp_path / 'x.json'}",
    )
    with np.load(stats, allow_pickle=False) as archive:
        assert set(archive.files) == {"mpdit_jax", "mu", "sigma", "features"}
    numbers = []
    for reference in (stats, "data:digits"):
        out = tmp_path / "y.json"
        run(capsys, f"--samples={files / 'samples.npz'}", f"--reference={reference}", features, f"--out={out}")
        numbers.append(json.loads(out.read_text())["results"][0]["metrics"])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-9)


def test_an_adm_reference_batch_brings_moments_and_images(tmp_path, tiny_inception, digits):
    images = digits[0]
    whole = collect(tiny_inception, [tiny_inception(images)], {})
    batch = tmp_path / "VIRTUAL_digits.npz"
    gaussians = whole.gaussians
    np.savez(
        batch, arr_0=images[:300], mu=gaussians["pool"].mean, sigma=gaussians["pool"].covariance,
        mu_s=gaussians["spatial"].mean, sigma_s=gaussians["spatial"].covariance,
    )  # fmt: skip
    options = evaluate.make_evaluate_parser().parse_args([f"--reference={batch}"])
    metrics = ("fd", "sfd", "is", "precision", "recall")
    reference = command.reference_statistics(options, tiny_inception, metrics, tmp_path / "scratch", (8, 8, 1))
    assert len(reference.features) == 300
    assert reference.about["shape"] == [8, 8, 1]
    assert reference.file["extractor_fingerprint"].startswith("unknown")
    fake = collect(tiny_inception, [tiny_inception(images[500:900])], {})
    noted = make_result("x", reference, fake, metrics, options, tiny_inception, {}).settings["reference"]
    assert (noted["count"], noted["features_count"], noted["images"]["count"]) == (None, 300, 300)
    found = compare(reference, fake, metrics)
    assert list(found) == ["FID", "sFID", "IS", "IS std", "precision", "recall"]
    expected = compare(whole, fake, ("fd", "sfd"))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_statistics_of_another_extractor_are_refused_by_name(tmp_path, tiny_inception, extractor, digits):
    path = tmp_path / "stats.npz"
    save_statistics(path, collect(extractor, [extractor(digits[0][:100])], {}))
    with pytest.raises(InputError, match=r"of the extractor classifier \([0-9a-f]{12}\) and this is inception"):
        load_statistics(path, tiny_inception)
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))  # as pytorch-fid writes them
    with pytest.raises(InputError, match="statistics of the extractor inception and this is classifier"):
        load_statistics(path, extractor)
    with pytest.raises(
        InputError,
        match=r"mu is float64 \(2048,\); expected floats \(4,\) of inception",
    ):
        load_statistics(path, tiny_inception)
    np.savez(path, mu=np.full(4, np.nan), sigma=np.eye(4))
    with pytest.raises(InputError, match="mu holds NaN"):
        load_statistics(path, tiny_inception)
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    stored = load_statistics(path, tiny_inception)
    with pytest.raises(InputError, match="has moments only, and for precision and recall"):
        compare(stored, stored, ("precision",))


@pytest.mark.parametrize(("features", "sentence"), [
    (np.full((5, 4), np.nan, np.float32), "features holds NaN or Inf"),
    (np.zeros((5, 3), np.float32), r"features is float32 \(5, 3\); expected floats \(5, 4\)"),
    (np.zeros((5, 4), np.int64), "features is int64"),
    (np.zeros(4, np.float32), "features is float32"),
])  # fmt: skip
def test_saved_features_of_another_form_are_refused(tmp_path, tiny_inception, features, sentence):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4), features=features)
    with pytest.raises(InputError, match=sentence):
        load_statistics(tmp_path / "stats.npz", tiny_inception)


def test_an_adm_batch_is_a_set_of_images_to_another_network(
    files, tmp_path, extractor, classifier_file, digits, monkeypatch, capsys
):
    """The batch's moments are Inception's; without Inception's weights the error says what to download."""
    batch, images = tmp_path / "VIRTUAL_digits.npz", digits[0][:300]
    np.savez(batch, arr_0=images, mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    options = evaluate.make_evaluate_parser().parse_args([f"--reference={batch}"])
    reference = command.reference_statistics(options, extractor, ("fd", "precision"), tmp_path / "scratch", (8, 8, 1))
    expected = collect(extractor, [extractor(images)], {})
    np.testing.assert_allclose(reference.gaussian("pool").mean, expected.gaussian("pool").mean, rtol=1e-5)
    np.testing.assert_array_equal(reference.features, expected.features)
    monkeypatch.setattr(inception_weights, "CACHE", tmp_path / "nothing")
    monkeypatch.delenv("MPDIT_JAX_INCEPTION", raising=False)
    said = last_line([f"--samples={files / 'samples.npz'}", f"--reference={batch}"], monkeypatch, capsys)
    assert "download pt_inception-2015-12-05-6726825d.pth" in said


def test_a_run_is_checked_before_its_reference_is_read(tmp_path, classifier_file, monkeypatch, capsys):
    workdir = make_workdir(tmp_path / "run")
    other = ClassifierConfig(16, 16, 1, num_classes=10, base_channels=4, features=8)
    save_classifier(tmp_path / "other.safetensors", initialize(other, seed=0))

    def look(*arguments, **settings):
        raise AssertionError("something was computed in vain")

    monkeypatch.setattr(command, "compute_statistics", look)
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 16, 16, 1), np.uint8))
    for arguments, sentence in (
        (["--solver=eulr"], "eulr"),
        (["--steps=0"], "steps=0"),
        (["--labels=5000"], "5000"),
        (["--guidance_scale=-1"], "guidance_scale=-1"),
        (["--step=77"], "77"),
        (["--guide=nowhere"], "nowhere"),
        ([f"--reference={tmp_path / 'large.npz'}"], "the samples are 8x8 pixels and the reference is 16x16"),
        ([f"--features=classifier:{tmp_path / 'other.safetensors'}"], "was trained on (16, 16, 1)"),
    ):
        given = [f"--workdir={workdir}", "--reference=data:digits", f"--features=classifier:{classifier_file}"]
        said = last_line([*given, "--num_samples=20", *arguments], monkeypatch, capsys)
        assert sentence in said, (arguments, said)


def test_a_metric_that_is_no_number_is_refused(tmp_path, tiny_inception, digits):
    seen = collect(tiny_inception, [tiny_inception(digits[0][:100])], {})
    far = dataclasses.replace(seen, features=np.full((100, 4), 3e38) * np.float64(1e80))
    options = evaluate.make_evaluate_parser().parse_args(["--samples=x"])
    with np.errstate(all="ignore"), pytest.raises(InputError, match=r"KID of x is .*: the features are too large"):
        make_result("x", far, seen, ("kid",), options, tiny_inception, {})


def test_moments_of_another_preprocessing_are_refused_or_warned_of(tmp_path, tiny_inception, digits, capsys):
    """Other projects' files do not name their preprocessing, but only ADM's have spatial moments."""
    moments = {"mu": np.zeros(4), "sigma": np.eye(4)}
    np.savez(tmp_path / "pytorch_fid.npz", **moments)
    np.savez(tmp_path / "adm.npz", **moments, mu_s=np.zeros(3), sigma_s=np.eye(3))
    usual, other = (
        dataclasses.replace(tiny_inception, settings={"preprocessing": name}) for name in ("tensorflow", "pytorch_fid")
    )
    assert "warning" not in load_statistics(tmp_path / "adm.npz", usual).file
    assert "warning" not in load_statistics(tmp_path / "pytorch_fid.npz", other).file
    assert not capsys.readouterr().out
    doubted = load_statistics(tmp_path / "pytorch_fid.npz", usual)
    said = capsys.readouterr().out
    assert "if pytorch-fid made it, give --preprocessing=pytorch_fid" in said
    assert said == f"warning: {doubted.file['warning']}\n"
    load_statistics(tmp_path / "pytorch_fid.npz", usual, prefix="config.eval.")
    assert "if pytorch-fid made it, give config.eval.preprocessing=pytorch_fid" in capsys.readouterr().out
    with pytest.raises(InputError, match="ADM resizes as TensorFlow does: expected --preprocessing=tensorflow, and it"):
        load_statistics(tmp_path / "adm.npz", other)
    save_statistics(tmp_path / "ours.npz", collect(tiny_inception, [tiny_inception(digits[0][:9])], {}))
    load_statistics(tmp_path / "ours.npz", usual)
    assert not capsys.readouterr().out


def test_a_perfect_model_with_few_images_scores_what_the_warning_says(extractor, digits):
    images = digits[0]
    real = collect(extractor, [extractor(images)], {})
    told = perfect_distance(real, 60)
    shuffled = np.random.default_rng(0).permutation(len(images))[:60]
    sampled = compare(real, collect(extractor, [extractor(images[shuffled])], {}), ("fd",))["FD(classifier)"]
    assert 0.5 < sampled / told < 2
    assert told > 3 * perfect_distance(real, 600)


def test_an_interrupted_pass_continues_at_its_next_block(files, tmp_path, extractor, monkeypatch):
    images = open_set(str(files / "samples.npz"))
    look = {"outputs": ["pool"], "keep": ["pool"], "verb": "features", "batch_size": 100, "block_size": 100}
    seen = []

    class Dying:
        about, shape = images.about, images.shape

        def __len__(self):
            return len(images)

        def read(self, rows):
            if len(seen) == 3:
                raise KeyboardInterrupt
            seen.append(rows)
            return images.read(rows)

    with pytest.raises(KeyboardInterrupt):
        compute_statistics(extractor, Dying(), **look, scratch=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*/*.npz")) == [f"{number:08d}.npz" for number in range(3)]
    seen.append(None)
    again = compute_statistics(extractor, Dying(), **look, scratch=tmp_path)
    assert [rows[0] for rows in seen[4:]] == [300, 400, 500]
    np.testing.assert_array_equal(again.features, extractor(np.asarray(images.images))["pool"])


@pytest.mark.slow
def test_a_run_is_drawn_and_compared_for_several_settings_in_one_go(tmp_path, classifier_file, capsys):
    workdir = make_workdir(tmp_path / "run")
    arguments = [
        f"--workdir={workdir}", f"--features=classifier:{classifier_file}", "--num_samples=30", "--steps=2,4",
        "--guidance_scale=1.5,1.0", "--batch_size=16",
    ]  # fmt: skip
    said = run(capsys, *arguments)
    rows = json.loads((workdir / "evaluation/results.json").read_text())["results"]
    names = [row["name"].partition(", ")[2] for row in rows]
    assert names == ["euler 2, w=1.5", "euler 2, w=1", "euler 4, w=1.5", "euler 4, w=1"]
    assert all(name in said for name in names)
    drawn = rows[0]["settings"]["sampler"]
    assert (drawn["label_scheme"], drawn["guidance_scale"], drawn["steps"]) == ("balanced", 1.5, 2)
    assert rows[0]["settings"]["samples"]["count"] == 30
    again = run(capsys, *arguments)
    assert again.count("done before") == 4
    assert json.loads((workdir / "evaluation/results.json").read_text())["results"] == rows
    # The same images, drawn into a file first, give the same numbers.
    out = tmp_path / "drawn.npz"
    one = ["--num_samples=30", "--steps=2", "--guidance_scale=1.5", "--batch_size=16"]
    assert sample([f"--workdir={workdir}", *one, f"--out={out}"]) == 0
    run(capsys, f"--samples={out}", "--reference=data:digits:train", arguments[1], f"--out={tmp_path / 'z.json'}")
    by_file = json.loads((tmp_path / "z.json").read_text())["results"][0]["metrics"]
    # The covariance of 30 images is singular: the square root of its product turns rounding of 1e-16 into 1e-8.
    assert by_file == pytest.approx(rows[0]["metrics"], rel=1e-8)


def test_bad_arguments_are_one_sentence(files, classifier_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inception_weights, "CACHE", tmp_path / "nothing")
    monkeypatch.delenv("MPDIT_JAX_INCEPTION", raising=False)
    samples, features = f"--samples={files / 'samples.npz'}", f"--features=classifier:{classifier_file}"
    big, floats, few = tmp_path / "big.npz", tmp_path / "floats.npz", tmp_path / "few.npz"
    np.savez(big, arr_0=np.zeros((9, 16, 16, 1), np.uint8))
    np.savez(floats, arr_0=np.zeros((9, 8, 8, 1), np.float32))
    np.savez(few, arr_0=np.zeros((3, 8, 8, 1), np.uint8))
    (tmp_path / "text.npz").write_text("nothing of the kind")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for index, size in enumerate((8, 9, 9, 9)):
        Image.new("L", (size, size)).save(mixed / f"{index}.png")
    reference = "--reference=data:digits"
    for arguments, sentence in (
        ([samples, reference, "--metrics=fid"], "download pt_inception-2015-12-05-6726825d.pth"),
        ([samples, reference, "--inception=none.pth"], "--inception=none.pth: no such file; download"),
        ([samples, reference, features, "--metrics=fid"], "ask for fd, which is printed as FD(classifier)"),
        ([samples, reference, features, "--metrics=sfd"], "classifier has no spatial output"),
        ([samples, reference, features, "--metrics=fad"], "expected some of fd, sfd, is"),
        ([samples, reference, "--features=vgg"], "features='vgg': expected one of inception"),
        ([samples, features], "--reference is missing"),
        ([reference, features], "give either --samples=SET or --workdir=FOLDER"),
        ([f"--samples={big}", reference, features], "the samples are 16x16 pixels and the reference is 8x8"),
        ([f"--samples={floats}", reference, features], "arr_0 is float32 (9, 8, 8, 1); expected uint8"),
        ([f"--samples={few}", reference, features], "need 4 images or more in each set: there are 3 samples"),
        ([f"--samples={tmp_path / 'text.npz'}", reference, features], "expected an .npz with images as arr_0"),
        ([f"--samples={tmp_path / 'none.npz'}", reference, features], "no such file or folder"),
        ([samples, "--reference=data:cats", features], "data:NAME[:SPLIT]"),
        ([samples, reference, features, "--num_samples=601"], "expected 1 to 600"),
        ([samples, reference, features, "--num_samples=3"], "need 4 images or more in each set: there are 3 samples"),
        ([samples, f"--reference={few}", features], f"there are 3 in --reference={few}"),
        ([samples, reference, features, "--metrics=fd", "--num_samples=1"], "there are 1 samples"),
        ([samples, reference, features, "--k=0"], "--k=0"),
        ([samples, reference, features, "--metrics=,"], "metrics=,: expected some of fd"),
        ([samples, features, "--metrics=fd", f"--save_stats={tmp_path / 's.npz'}"], "--reference is missing"),
        ([samples, features, f"--save_stats={tmp_path / 'text.npz' / 's.npz'}"], "cannot write"),
        ([samples, features, f"--save_stats={samples.partition('=')[2]}"], "is what --samples reads: give another"),
        (["--inception=w.safetensors", "--save_inception=./w.safetensors"], "is what --inception reads: give another"),
        (["--inception=w.pth", "--save_inception=w.npz"], "expected a name that ends in .safetensors"),
        ([samples, reference, features, "--save_features"], "--save_features goes with --save_stats"),
        ([samples, reference, features, "--preprocessing=pytorch_fid"], "--preprocessing=pytorch_fid is of the Inc"),
        ([samples, reference, features, "--inception=none.pth"], "--inception=none.pth is of the Inception network"),
        ([samples, reference, "--metrics= is"], "download pt_inception-2015-12-05-6726825d.pth"),
        ([samples, reference, "--metrics=fd, fid"], "download pt_inception-2015-12-05-6726825d.pth"),
        ([samples, reference, "--metrics=sfd"], "download pt_inception-2015-12-05-6726825d.pth"),
        ([samples, reference, features, "--out=x.txt"], "ends in .json"),
        ([samples, reference, features, "--feature_size=64"], "with efficientnet_lite0 alone"),
        ([f"--samples={mixed}", reference, features, "--image_size=-5"], "--image_size=-5: expected 1 to 4096 pixels"),
        ([f"--samples={mixed}", reference, features, "--image_size=1000000"], "--image_size=1000000: expected 1 to"),
        (["--samples=~nobody_here/s.npz", reference, features], "~nobody_here/s.npz: this machine knows no home"),
        ([samples, "--reference=~nobody_here/s.npz", features], "~nobody_here/s.npz: this machine knows no home"),
        ([f"--samples={few}", f"--reference={mixed}", features, "--metrics=fd"], "give --image_size=PIXELS"),
        ([f"--samples={mixed}", reference, features, "--image_size=16"], "images of 8x8 pixels and --image_size is 16"),
        ([f"--samples={few}", reference, features, "--image_size=16"], "images of 8x8 pixels and --image_size is 16"),
        ([f"--samples={mixed}", reference, features], "expected one size, as samples have"),
    ):
        monkeypatch.setattr("mpdit_jax.runtime.progress.WorkBar.say", lambda *args: None)
        if "--out=x.txt" not in arguments:
            arguments.append(f"--out={tmp_path / 'out.json'}")
        assert not (tmp_path / "out.json.unfinished").exists(), "something was computed in vain"
        stderr = last_line(arguments, monkeypatch, capsys)
        assert sentence in stderr, (arguments, stderr)
    monkeypatch.setenv("MPDIT_JAX_INCEPTION", "typo.pth")
    stderr = last_line([samples, reference, f"--out={tmp_path / 'out.json'}"], monkeypatch, capsys)
    assert "MPDIT_JAX_INCEPTION=typo.pth: no such file" in stderr
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("flag", [
    "--step=5", "--no_ema", "--labels=random", "--class_names=a.txt", "--solver=euler,heun", "--steps=50",
    "--time_grid=shifted", "--time_shift=3.0", "--guidance_scale=1.5,2.0", "--guidance_interval=0.2,0.8",
    "--negative_labels=3:8,5:6", "--guide=weak", "--rtol=0.1", "--atol=0.1", "--diffusion=sigma",
    "--diffusion_norm=2.0", "--precision=bfloat16",
])  # fmt: skip
def test_flags_of_drawing_are_refused_where_nothing_is_drawn(flag, tmp_path, monkeypatch, capsys):
    samples = tmp_path / "samples.npz"
    arguments = [f"--samples={samples}", "--reference=data:digits", flag]
    said = refusal(evaluate.main, arguments, monkeypatch, capsys)
    assert said.startswith(f"{flag} is for drawing from --workdir, and --samples={samples} is drawn already: ")


def test_a_run_given_as_samples_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").mkdir()
    said = refusal(evaluate.main, [f"--samples={tmp_path}", "--reference=data:digits"], monkeypatch, capsys)
    assert said == f"--samples={tmp_path} is a run: give --workdir={tmp_path} to draw from it.\n"


def test_an_image_size_is_refused_where_no_folder_is_cut(files, classifier_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/manifest.json").write_text("{}")
    for reference in ("", "data:digits", str(files / "samples.npz"), str(tmp_path / "store")):
        arguments = [f"--workdir={tmp_path}", "--image_size=8", *([f"--reference={reference}"] if reference else [])]
        said = refusal(evaluate.main, arguments, monkeypatch, capsys)
        what = f"--reference={reference}" if reference else "the data of the run"
        assert said.startswith(f"--image_size=8 cuts the images of a reference's folder, and {what} is none: leave")
    for reference in (files / "images", tmp_path / "nothing"):  # refused for what is wrong with the rest
        arguments = [f"--workdir={tmp_path / 'none'}", "--image_size=8", f"--reference={reference}"]
        assert "holds no run" in refusal(evaluate.main, arguments, monkeypatch, capsys)
    stats = [f"--features=classifier:{classifier_file}", f"--save_stats={tmp_path / 'stats.npz'}"]
    stats += [f"--samples={files / 'samples.npz'}", f"--out={tmp_path / 'o.json'}"]
    said = refusal(evaluate.main, [*stats, "--image_size=16"], monkeypatch, capsys)
    assert "holds images of 8x8 pixels and --image_size is 16, which cuts the images of a folder alone: leave" in said
    run(capsys, *stats, "--image_size=8")


def test_photographs_are_cut_for_a_reference_and_samples_are_not(files, classifier_file, tmp_path, capsys):
    """Photographs of any size are cut as a reference and for --save_stats; as samples to compare they are refused."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    random = np.random.default_rng(0)
    for index, size in enumerate((20, 6, 9, 12)):
        Image.fromarray(random.integers(0, 256, (size, size), np.uint8)).save(photographs / f"{index}.png")
    cut = [f"--features=classifier:{classifier_file}", "--image_size=8", f"--out={tmp_path / 'o.json'}"]
    run(capsys, f"--samples={photographs}", f"--save_stats={tmp_path / 'stats.npz'}", *cut)
    samples = [f"--samples={files / 'samples.npz'}", "--metrics=fd"]
    numbers = []
    for reference in (photographs, tmp_path / "stats.npz"):
        run(capsys, *samples, f"--reference={reference}", *cut)
        (row,) = json.loads((tmp_path / "o.json").read_text())["results"]
        numbers.append(row["metrics"])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-9)
    with pytest.raises(InputError, match="images of 20x20 pixels and --image_size is 8"):
        evaluate.main([f"--samples={photographs}", "--reference=data:digits", "--metrics=fd", *cut])


def test_two_at_once_do_not_share_an_output(files, classifier_file, tmp_path, monkeypatch, capsys):
    """The second command is refused while the first runs, and does the first no harm."""
    out = tmp_path / "out.json"
    arguments = [f"--samples={files / 'samples.npz'}", f"--features=classifier:{classifier_file}", f"--out={out}"]
    arguments += ["--reference=data:digits", "--metrics=fd"]
    with lock_scratch(tmp_path / "out.json.unfinished", [out]):
        said = last_line(arguments, monkeypatch, capsys)
        assert re.search(r"another evaluation is using .*out\.json\.unfinished \(process \d+ on ", said)
        assert not out.exists()
    assert not list(tmp_path.iterdir())
    run(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_the_inception_score_needs_no_reference_and_reads_none(files, classifier_file, tmp_path, capsys):
    out, features = tmp_path / "o.json", f"--features=classifier:{classifier_file}"
    for more in ([], ["--reference=none.npz"]):
        run(capsys, f"--samples={files / 'samples.npz'}", features, "--metrics=is", f"--out={out}", *more)
        (row,) = json.loads(out.read_text())["results"]
        assert row["metrics"]["IS(classifier)"] > 5
        assert row["settings"]["reference"] is None
        assert row["settings"]["samples"]["labels"]["classes"] == 10


def test_too_few_images_are_warned_of_for_every_distance_and_either_set(tiny_inception, digits):
    seen = [collect(tiny_inception, [tiny_inception(digits[0][:count])], {}) for count in (100, 2)]
    notes, scores = describe_bias(seen[0], 2, ["sfd"])
    assert notes[0].startswith("2 samples are fewer than the 3 features of inception: sFID")
    assert scores.keys() == {"sFID"}
    (note,), scores = describe_bias(seen[1], 100, ["fd"])
    assert note.startswith("the reference's 2 images are fewer than the 4 features")
    assert not scores


def last_line(arguments, monkeypatch, capsys):
    """Return the error of a command that may have printed a progress bar before."""
    import sys

    from mpdit_jax.runtime import cli

    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.run(evaluate.main)
    assert done.value.code == 1
    stderr = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(stderr) == 1
    return stderr[0]


def test_nothing_is_written_for_a_run_that_is_not_there(tmp_path, classifier_file, monkeypatch, capsys):
    arguments = [
        f"--workdir={tmp_path / 'none'}",
        f"--features=classifier:{classifier_file}",
        f"--out={tmp_path / 'o.json'}",
    ]
    assert "holds no run" in refusal(evaluate.main, arguments, monkeypatch, capsys)
