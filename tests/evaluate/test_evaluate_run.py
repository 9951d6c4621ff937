"""`python -m mpdit_jax.evaluate --workdir` computes rows anew when something changes, and records their settings."""

import dataclasses
import json

import numpy as np
import pytest

from mpdit_jax.data.sources import load_digits
from mpdit_jax.errors import InputError
from mpdit_jax.evaluate import __main__ as evaluate
from mpdit_jax.evaluate import command, reference, runs
from mpdit_jax.evaluate.compute import compute_statistics
from mpdit_jax.evaluate.drawn_images import DrawnImages
from mpdit_jax.evaluate.reference import Reference
from mpdit_jax.evaluate.stored_statistics import save_statistics
from mpdit_jax.sample.drawing import to_block
from mpdit_jax.vae import load_vae
from tests.evaluate.conftest import collect
from tests.prepare.conftest import make_vae
from tests.sample.conftest import make_workdir

FEW = ("--num_samples=20", "--steps=1", "--batch_size=20")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("runs") / "run")


def evaluated(capsys, out, *arguments):
    """Evaluate and return what was printed, and the only row."""
    assert evaluate.main([*FEW, f"--out={out}", *map(str, arguments)]) == 0
    (row,) = json.loads(out.read_text())["results"]
    return capsys.readouterr().out, row


def test_another_reference_makes_another_row_and_a_row_records_its_settings(
    workdir, tmp_path, extractor, classifier_file, capsys, digits, monkeypatch
):
    stats, out = tmp_path / "stats.npz", tmp_path / "numbers.json"
    real = collect(extractor, [extractor(digits[0])], {"path": "digits", "shape": [8, 8, 1]})
    save_statistics(stats, real, features=True)
    arguments = (f"--workdir={workdir}", f"--features=classifier:{classifier_file}", f"--reference={stats}")
    metrics = "--metrics=fd, is, precision, kid"
    _, first = evaluated(capsys, out, *arguments, metrics)
    said, second = evaluated(capsys, out, *arguments, metrics)
    assert "done before" in said
    assert second == first
    settings = first["settings"]
    assert settings["reference"]["file"]["path"] == str(stats)
    assert settings["reference"]["path"] == "digits"
    assert (settings["reference"]["count"], settings["reference"]["features_count"]) == (1797, 1797)
    assert (settings["splits"], settings["kid"], settings["k"]) == (10, {"subsets": 100, "subset_size": 10}, 3)
    sampler = settings["sampler"]
    assert (sampler["checkpoint"], sampler["precision"], sampler["vae_fingerprint"]) == (1, "float32", None)
    assert sampler["label_counts"] == {"classes": 10, "fewest": 2, "most": 2}
    monkeypatch.setattr(runs, "__version__", "99.0")  # another version may compute other numbers
    said, of_later = evaluated(capsys, out, *arguments, metrics)
    assert "done before" not in said
    assert of_later["metrics"] == first["metrics"]
    # Other statistics in the same file make another row.
    save_statistics(stats, collect(extractor, [extractor(255 - digits[0])], real.about), features=True)
    said, third = evaluated(capsys, out, *arguments, metrics)
    assert "done before" not in said
    assert third["metrics"]["FD(classifier)"] != first["metrics"]["FD(classifier)"]


def test_changed_data_of_the_run_make_another_row(tmp_path, classifier_file, capsys, digits):
    """Repaired images with the same labels make another row; a copy of the same images does not."""
    workdir, data, out = make_workdir(tmp_path / "run"), tmp_path / "data.npz", tmp_path / "numbers.json"
    config = json.loads((workdir / "config.json").read_text())
    config["data"] |= {"name": "arrays", "path": str(data)}
    (workdir / "config.json").write_text(json.dumps(config))
    arguments = (f"--workdir={workdir}", f"--features=classifier:{classifier_file}", "--metrics=fd")
    numbers, known = [], []
    for images in (digits[0][:90], digits[0][:90], 255 - digits[0][:90]):
        np.savez(data, images=images, labels=digits[1][:90])
        said, row = evaluated(capsys, out, *arguments)
        known.append("done before" in said)
        numbers.append(row["metrics"]["FD(classifier)"])
    assert known == [False, True, False]
    assert numbers[0] == numbers[1] != numbers[2]


def test_statistics_and_batches_of_another_size_are_refused_before_anything_is_drawn(
    workdir, tmp_path, extractor, classifier_file, digits, monkeypatch
):
    stats, features = tmp_path / "stats.npz", f"--features=classifier:{classifier_file}"
    save_statistics(stats, collect(extractor, [extractor(digits[0][:90])], {"shape": [16, 16, 1]}))
    np.savez(tmp_path / "samples.npz", arr_0=digits[0][:90])
    for samples in (f"--workdir={workdir}", f"--samples={tmp_path / 'samples.npz'}"):
        with pytest.raises(InputError, match="the samples are 8x8 pixels and the reference is 16x16"):
            evaluate.main([samples, features, f"--reference={stats}", "--metrics=fd", f"--out={tmp_path / 'o.json'}"])
    assert not (tmp_path / "o.json.unfinished").exists()
    with pytest.raises(InputError, match="the samples are 8x8 pixels and the reference is 16x16"):  # as while training
        Reference(str(stats), ["fd"], None, None, "config.eval.").check(extractor, load_digits().shape)
    # A file of another project does not record the size, but the images in it have one.
    as_inception(monkeypatch, dataclasses.replace(extractor, name="inception"))
    with np.load(stats) as archive:
        np.savez(stats, mu=archive["mu"], sigma=archive["sigma"], arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    with pytest.raises(InputError, match="the samples are 8x8 pixels and the reference is 16x16"):
        evaluate.main([f"--workdir={workdir}", f"--reference={stats}", "--metrics=fid", f"--out={tmp_path / 'o.json'}"])


def as_inception(monkeypatch, extractor):
    """Make every command use this extractor under the name inception."""
    monkeypatch.setattr(command, "choose_features", lambda *given: "inception")
    monkeypatch.setattr(command, "prepare_extractor", lambda *given: extractor)


def test_a_limited_number_of_a_runs_own_images_is_read(workdir, monkeypatch):
    monkeypatch.setattr(reference, "MOST_REAL", 100)
    options = evaluate.make_evaluate_parser().parse_args([f"--workdir={workdir}"])
    images = command.make_reference(options, ["fd"]).own()
    assert (len(images), images.about["count"], images.about["shape"]) == (100, 100, [8, 8, 1])
    assert images.about["of"] == 898


@pytest.mark.slow
def test_a_run_on_latents_is_decoded_by_its_vae(tmp_path, capsys, monkeypatch, tiny_inception):
    as_inception(monkeypatch, tiny_inception)
    vae = make_vae(tmp_path / "vae", seed=0)
    workdir = make_workdir(tmp_path / "run", in_channels=2)
    fingerprint = load_vae(str(vae)).fingerprint
    space = {"mean": [0.0, 0.0], "std": [1.0, 1.0], "vae_fingerprint": fingerprint}
    facts = {"class_names": [str(label) for label in range(10)], "latents": space, "labels": None}
    (workdir / "data.json").write_text(json.dumps(facts))
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (70, 16, 16, 1), np.uint8))
    arguments = (f"--workdir={workdir}", f"--vae={vae}", f"--reference={tmp_path / 'real.npz'}", "--metrics=fid")
    _, row = evaluated(capsys, tmp_path / "o.json", *arguments)
    assert row["settings"]["sampler"]["vae_fingerprint"] == fingerprint
    assert row["settings"]["samples"]["shape"] == [16, 16, 1]
    assert row["metrics"]["FID"] > 0


class Drawn:
    """A drawing of six images, of which those numbered `broken` are NaN."""

    def __init__(self, *broken):
        self._broken = broken

    def __len__(self):
        return 6

    def draw(self, rows):
        pictures = np.zeros((len(rows), 8, 8, 1), np.float32)
        pictures[np.isin(rows, self._broken)] = np.nan
        return to_block(pictures, rows, rows)


def test_a_drawn_image_that_is_not_finite_is_named():
    images = DrawnImages(Drawn(5), (8, 8, 1), {})
    assert images.read(np.arange(5)).shape == (5, 8, 8, 1)
    with pytest.raises(InputError, match="image 5 that the model drew holds NaN or Inf"):
        images.read(np.arange(6))


def test_while_training_images_that_are_not_finite_are_left_out(tiny_inception):
    images = DrawnImages(Drawn(1, 2, 3), (8, 8, 1), {}, leave_out=True)
    found = compute_statistics(tiny_inception, images, ["pool"], ["pool"], "features", batch_size=2)
    assert (found.count, found.features.shape) == (3, (3, 4))
    none = DrawnImages(Drawn(*range(6)), (8, 8, 1), {}, leave_out=True)
    assert compute_statistics(tiny_inception, none, ["pool"], [], "features", batch_size=2).count == 0
