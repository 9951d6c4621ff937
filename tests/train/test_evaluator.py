"""Evaluations while a run trains: their lines in the log, and the same bits after an interruption."""

import dataclasses
import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import FrozenConfigDict

from mpdit_jax.checkpoint.load import load_checkpoint
from mpdit_jax.data import sources
from mpdit_jax.data.image_sets import ArrayImages, open_npz
from mpdit_jax.data.sources import array_source, load_arrays
from mpdit_jax.distributed.mesh import make_mesh, replicated
from mpdit_jax.errors import ConfigError, DataError, InputError, WeightsError
from mpdit_jax.evaluate import compute, inception_weights, reference
from mpdit_jax.evaluate.bias import describe_bias, few_images
from mpdit_jax.evaluate.classifier import ClassifierConfig, initialize, save_classifier
from mpdit_jax.evaluate.compute import compute_statistics
from mpdit_jax.evaluate.extractors import build_classifier
from mpdit_jax.evaluate.reference import Reference, own_images
from mpdit_jax.evaluate.shared_values import portable
from mpdit_jax.evaluate.statistics import Gaussian
from mpdit_jax.evaluate.stored_statistics import load_statistics
from mpdit_jax.model.parameters import split
from mpdit_jax.sample import drawing
from mpdit_jax.train import evaluator
from mpdit_jax.train.__main__ import main
from mpdit_jax.train.eval_settings import note_settings
from tests.evaluate.conftest import digits as digits
from tests.evaluate.conftest import tiny_inception as tiny_inception
from tests.tiny import digits_file, train_arguments
from tests.train.test_processes import launch

EVAL = [
    "--config.eval.every=4", "--config.eval.num_samples=24", "--config.eval.guidance_scales=1.0,2.0",
    "--config.eval.features=classifier", "--config.eval.steps=2", "--config.eval.metrics=fd,precision,recall",
    "--config.eval.classifier_steps=20", "--config.eval.batch_size=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    assert main(train_arguments(workdir, *EVAL)) == 0
    return workdir


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_evaluations_have_lines_of_their_own_and_curves(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = lines(undisturbed)
    assert [(line["step"], "loss" in line) for line in found] == [
        (3, True),
        (4, False),
        (6, True),
        (8, True),
        (8, False),
    ]
    names = {f"eval/{m}(classifier)/guidance_{w}" for m in ("FD", "precision", "recall") for w in (1, 2)}
    assert set(found[1]) == {"step", *names}
    assert found[1] != {**found[4], "step": 4}
    assert found[1]["eval/FD(classifier)/guidance_1"] > 0
    events = EventAccumulator(str(undisturbed / "tensorboard"))
    events.Reload()
    assert names <= set(events.Tags()["scalars"])
    assert len(list((undisturbed / "evaluation").glob("real_*.npz"))) == 1


@pytest.mark.slow
def test_a_run_stopped_within_an_evaluation_makes_up_for_it(undisturbed, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    # As SIGTERM does: the evaluation of step 4 ends with nothing, and the run after that step.

    evaluate = evaluator.Evaluator._evaluate

    def stopped(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *arguments)

    monkeypatch.setattr(evaluator.Evaluator, "_evaluate", stopped)
    assert main(train_arguments(workdir, *EVAL)) == 0
    assert [line["step"] for line in lines(workdir)] == [3]
    monkeypatch.setattr(evaluator.Evaluator, "_evaluate", evaluate)
    assert main(train_arguments(workdir, *EVAL)) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_a_run_stopped_within_its_last_evaluation_is_not_done(undisturbed, tmp_path, monkeypatch, capsys):
    """The exit status says that the run was stopped, so that schedulers start it again."""
    workdir, calls, evaluate = tmp_path / "run", [], evaluator.Evaluator._evaluate

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 3:  # after two guidance scales at step 4
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *arguments)

    monkeypatch.setattr(evaluator.Evaluator, "_evaluate", stopped)
    monkeypatch.setenv("MPDIT_JAX_STOPPED_STATUS", "75")
    assert main(train_arguments(workdir, *EVAL)) == 75
    said = capsys.readouterr().out
    assert "the evaluation of step 8 was interrupted: the same command repeats it" in said
    assert "stopped at step 8 of 8, saved; continue with:" in said
    assert main(train_arguments(workdir, *EVAL)) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_run_stopped_while_it_looks_at_real_images_makes_up_for_it(undisturbed, tmp_path, monkeypatch):
    read = reference.SourceImages.read

    def stopped(self, indices):
        os.kill(os.getpid(), signal.SIGTERM)
        return read(self, indices)

    monkeypatch.setattr(reference.SourceImages, "read", stopped)
    assert main(train_arguments(tmp_path / "run", *EVAL)) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [3]
    assert not list((tmp_path / "run/evaluation").glob("real_*.npz"))
    monkeypatch.undo()
    assert main(train_arguments(tmp_path / "run", *EVAL)) == 0
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_another_classifier_looks_at_the_real_images_again(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    whole = lines(workdir)
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in whole[:-1]))
    assert main(train_arguments(workdir, *EVAL, "--config.eval.classifier_steps=10")) == 0
    assert lines(workdir)[-1].keys() == whole[-1].keys()
    assert lines(workdir)[-1] != whole[-1]
    before = {path.name for path in (undisturbed / "evaluation").iterdir()}
    assert len(before) == 3  # a classifier, what it saw, and the settings
    (kept,) = (workdir / "evaluation").glob("real_*.npz")
    assert kept.name not in before


def test_one_curve_of_two_kinds_is_told_and_noted(undisturbed, tmp_path, capsys):
    """The note has the step and the changed settings; an evaluation that is only repeated gives no note."""
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    settings, whole = workdir / "evaluation/settings.json", lines(workdir)
    (first,) = json.loads(settings.read_text())
    assert first["from_step"] == 4
    assert (first["settings"]["num_samples"], first["settings"]["steps"]) == (24, 2)
    for more in ([], ["--config.eval.num_samples=20", "--config.eval.classifier_steps=10"], []):
        (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in whole[:-1]))
        capsys.readouterr()
        assert main(train_arguments(workdir, *EVAL, *more)) == 0
        said, noted = capsys.readouterr().out, json.loads(settings.read_text())
        assert noted[0] == first
        assert len(noted) == 1 + bool(more)
        assert ("cannot be compared" in said) == bool(more)
        if more:
            assert "evaluations from step 8 on cannot be compared with earlier ones" in said
            assert re.search(
                r"extractor classifier \w{12} instead of classifier \w{12}, num_samples 20 instead of 24", said
            )
            assert (noted[1]["from_step"], noted[1]["settings"]["num_samples"]) == (8, 20)
    assert lines(workdir) == whole


def test_other_images_under_the_same_labels_are_looked_at_anew(undisturbed, tmp_path, monkeypatch, capsys):
    """A run may continue with them, but statistics and a classifier of the old images are not used."""
    workdir, digits = shutil.copytree(undisturbed, tmp_path / "run"), load_arrays(str(digits_file()))
    inverse = lambda rows: {"x": -digits.read(rows)["x"]}  # noqa: E731
    repaired = dataclasses.replace(digits, read=inverse, contents="of others")
    monkeypatch.setitem(sources.SOURCES, "arrays", lambda path, split: repaired)
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines(workdir)[:-1]))
    assert main(train_arguments(workdir, *EVAL)) == 0
    before, now = ({path.name for path in (of / "evaluation").iterdir()} for of in (undisturbed, workdir))
    assert len(now - before) == 2  # a classifier, and what it sees
    said = capsys.readouterr().out
    assert "evaluations from step 8 on cannot be compared with earlier ones" in said
    assert re.search(r"extractor classifier \w{12} instead of .*, reference \w{16} instead of \w{16}", said)


def test_settings_are_noted_where_they_change(tmp_path):
    path = tmp_path / "evaluation/settings.json"
    one, other = {"steps": 25, "solver": "euler"}, {"steps": 50, "solver": "euler"}
    assert note_settings(path, 100, one) == ""
    assert note_settings(path, 200, one) == ""
    assert note_settings(path, 300, other).endswith("earlier ones of the same name: steps 50 instead of 25")
    assert note_settings(path, 400, other) == ""
    assert [entry["from_step"] for entry in json.loads(path.read_text())] == [100, 300]
    assert "steps 50 instead of 25" in note_settings(path, 200, other)  # from an older checkpoint
    assert [entry["from_step"] for entry in json.loads(path.read_text())] == [100, 200]
    path.write_text("[{}]")
    assert note_settings(path, 500, one) == ""
    assert [entry["from_step"] for entry in json.loads(path.read_text())] == [500]


def test_samples_that_are_not_finite_are_counted(undisturbed, tmp_path, monkeypatch):
    """If too few are left for precision and recall, these are missing from the line, and the run goes on."""
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    whole = lines(workdir)
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in whole[:-1]))

    to_block = drawing.to_block

    def broken(pictures, labels, rows):
        return to_block(np.where(rows[:, None, None, None] < 3, pictures, np.nan), labels, rows)

    monkeypatch.setattr(drawing, "to_block", broken)
    assert main(train_arguments(workdir, *EVAL)) == 0
    last = lines(workdir)[-1]
    assert set(last) == {"step"} | {f"eval/{m}/guidance_{w}" for m in ("FD(classifier)", "not_finite") for w in (1, 2)}
    assert last["eval/not_finite/guidance_1"] == 21


def test_a_run_whose_samples_are_all_broken_is_done_all_the_same(undisturbed, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    whole = lines(workdir)
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in whole[:-1]))
    to_block = drawing.to_block
    monkeypatch.setattr(
        drawing, "to_block", lambda pictures, labels, rows: to_block(np.full_like(pictures, np.nan), labels, rows)
    )
    assert main(train_arguments(workdir, *EVAL)) == 0
    assert lines(workdir)[-1] == {"step": 8} | {f"eval/not_finite/guidance_{w}": 24 for w in (1, 2)}
    capsys.readouterr()
    assert main(train_arguments(workdir, *EVAL)) == 0
    assert "is done: 8 of 8 steps" in capsys.readouterr().out


def test_a_finished_run_makes_up_for_its_last_evaluation(undisturbed, tmp_path, capsys):

    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    whole = (workdir / "metrics.jsonl").read_bytes()
    (workdir / "metrics.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert main(train_arguments(workdir, *EVAL)) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == whole
    capsys.readouterr()
    assert main(train_arguments(workdir, *EVAL)) == 0
    assert "is done: 8 of 8 steps" in capsys.readouterr().out


@pytest.mark.parametrize(("override", "sentence"), [
    ("--config.eval.guidance_scales=-1.0,2.0", "config.eval.guidance_scales"),
    ("--config.label_dropout=0.0", "config.eval.guidance_scales=(1.0, 2.0): expected 1.0 with config.label_dropout=0"),
    ("--config.eval.metrics=fad,fd", "config.eval.metrics=fad: expected some of fd"),
    ("--config.eval.num_samples=0", "config.eval.num_samples=0: expected 1 or more"),
    ("--config.eval.every=-1", "config.eval.every=-1"),
    ("--config.eval.features=vgg", "features='vgg'"),
    ("--config.eval.solver=zzz", "zzz"),
    ("--config.eval.num_samples=3", "config.eval.num_samples=3: expected 4 or more for config.eval.metrics=fd,pre"),
    ("--config.eval.reference=NOTHING", "NOTHING: no such file or folder"),
    ("--config.eval.reference=FEW", "need 4 images or more in each set: there are 3 in config.eval.reference="),
    ("--config.eval.reference=LARGE", "the samples are 8x8 pixels and the reference is 16x16"),
    ("--config.eval.reference=COLOURED", "has images of 3 channel(s) and the samples have 1: expected the same"),
    ("--config.eval.reference=MOMENTS", "holds statistics, and this run trains its own classifier: give images"),
    ("--config.eval.preprocessing=adm", "config.eval.preprocessing='adm': expected one of tensorflow, pytorch_fid"),
    ("--config.eval.preprocessing=pytorch_fid", "config.eval.preprocessing=pytorch_fid is for features=inception only"),
    ("--config.eval.metrics=fd,sfd", "sfd needs spatial features, which only Inception has"),
    ("--config.eval.features=classifier:OTHER", "was trained on images (16, 16, 1) (height, width, channels) and this"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused_before_training(override, sentence, tmp_path):
    np.savez(tmp_path / "MOMENTS.npz", mu=np.zeros(4), sigma=np.eye(4))
    other = ClassifierConfig(16, 16, 1, num_classes=10, base_channels=4, features=8)
    save_classifier(tmp_path / "OTHER.safetensors", initialize(other, seed=0))
    override = override.replace("MOMENTS", str(tmp_path / "MOMENTS.npz"))
    override = override.replace("OTHER", str(tmp_path / "OTHER.safetensors"))
    for name, shape in (("FEW", (3, 8, 8, 1)), ("LARGE", (5, 16, 16, 1)), ("COLOURED", (5, 8, 8, 3))):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.zeros(shape, np.uint8))
        override = override.replace(name, str(tmp_path / f"{name}.npz"))
    with pytest.raises((ConfigError, DataError, InputError), match=re.escape(sentence)):
        main(train_arguments(tmp_path / "run", *EVAL, override))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("count", "channels", "sentence"), [
    (19, 1, "config.eval.features='classifier': 19 images of 2 class(es): a classifier needs 20"),
    (30, 2, "this run draws images of 2 channels, and classifier expects 1 or 3"),
])  # fmt: skip
def test_data_that_cannot_be_looked_at_are_refused_before_training(tmp_path, count, channels, sentence):
    path = tmp_path / "data.npz"
    np.savez(path, images=np.zeros((count, 8, 8, channels), np.uint8), labels=np.arange(count) % 2)
    data = ["--config.data.name=arrays", f"--config.data.path={path}", f"--config.model.in_channels={channels}"]
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        main(train_arguments(tmp_path / "run", *EVAL, *data, "--config.model.num_classes=2"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_adm_batch_brings_single_images_to_a_run_as_well(tmp_path, tiny_inception):
    """FID uses the batch's moments, precision and recall its images; `~` stands for the home folder."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    moments = {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "adm.npz", arr_0=images, **moments)
    place = f"~/{os.path.relpath(tmp_path / 'adm.npz', Path.home())}"
    one = Reference(place, ("fd", "precision"), None, None, "config.eval.")
    one.check(tiny_inception, (8, 8, 1))
    compute = partial(compute_statistics, tiny_inception, batch_size=16)
    found = one.statistics(tiny_inception, (8, 8, 1), compute)
    assert found.gaussians["pool"].mean.tolist() == [0.0] * 4
    np.testing.assert_allclose(found.features, tiny_inception(images)["pool"], rtol=1e-6)


def test_statistics_of_real_images_are_kept_for_later_starts(tmp_path, tiny_inception):
    images = ArrayImages(np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8), {"path": "here"})
    one, computed = evaluator.Evaluator.__new__(evaluator.Evaluator), []
    one._folder = tmp_path

    def compute(*given):
        computed.append(given)
        return compute_statistics(*given, batch_size=16)

    one._compute = compute
    first, second = (one._real_statistics(tiny_inception, images, ["pool"], ["pool"], "features") for _ in range(2))
    assert len(computed) == len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(first.features, second.features)
    assert second.file == {}
    assert portable(first.about) == portable(second.about)


def test_inception_sees_images_as_the_config_says(tmp_path, monkeypatch):
    """A reference with another preprocessing is refused, and the message names the field."""
    made, moments = [], {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "adm.npz", **moments)
    outputs = {"pool": 4, "spatial": 3}

    def making(features, *, inception_path, preprocessing, batch_size, prefix):
        made.append(preprocessing)
        settings = {"preprocessing": preprocessing}
        return SimpleNamespace(
            name=features, fingerprint="", outputs=outputs, settings=settings, image_shape=None, channels=3
        )

    monkeypatch.setattr(evaluator, "make_extractor", making)
    arguments = ["--config.eval.features=inception", f"--config.eval.reference={tmp_path / 'adm.npz'}"]
    arguments += ["--config.eval.preprocessing=pytorch_fid", "--config.eval.metrics=fid"]
    with pytest.raises(InputError, match=r"expected config\.eval\.preprocessing=tensorflow, and it is py"):
        main(train_arguments(tmp_path / "run", *EVAL, *arguments))
    assert made == ["pytorch_fid"]


@pytest.mark.parametrize(("given", "sentence"), [
    ("none.pth", "config.eval.inception=none.pth: no such file; download"),
    ("", "there are no Inception weights in"),
    ("OTHER", "is torchvision's Inception v3 of 1,000 classes"),
])  # fmt: skip
def test_missing_weights_are_remedied_by_fields_of_the_config(tmp_path, monkeypatch, given, sentence):
    """The messages name fields of the config, since `train` has neither --inception nor --features."""
    monkeypatch.setattr(inception_weights, "CACHE", tmp_path / "nothing")
    monkeypatch.delenv(inception_weights.VARIABLE, raising=False)
    other = tmp_path / "OTHER.safetensors"
    safetensors.numpy.save_file({"fc.weight": np.zeros((1000, 2048), np.float32)}, other)
    path = str(other) if given == "OTHER" else given
    more = ["--config.eval.features=inception", "--config.eval.metrics=fid", f"--config.eval.inception={path}"]
    with pytest.raises(WeightsError, match=re.escape(sentence)) as refused:
        main(train_arguments(tmp_path / "run", *EVAL, *more))
    said = str(refused.value)
    assert "give its path by config.eval.inception=FILE" in said
    assert "(config.eval.features=efficientnet_lite0)" in said
    assert "--" not in said


def test_statistics_of_another_extractor_are_remedied_by_a_field_of_the_config(tmp_path, tiny_inception):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4))
    other = dataclasses.replace(tiny_inception, name="efficientnet_lite0")
    with pytest.raises(InputError, match=r"do not compare; use config\.eval\.features and the weights"):
        load_statistics(tmp_path / "stats.npz", other, prefix="config.eval.")


def test_what_is_looked_at_is_compared_with_the_other_processes(tmp_path, digits, monkeypatch):
    """Processes compare the reference before the first step and before they share its images."""
    np.savez(tmp_path / "real.npz", arr_0=digits[0][:40])
    compared = []
    for module in (evaluator, reference, compute):
        monkeypatch.setattr(module, "assert_equal_across_processes", compared.append)
    monkeypatch.setattr(evaluator, "name_from_process_0", lambda name: "0" * 16)
    workdir = tmp_path / "run"
    more = [
        "--config.eval.every=8",
        "--config.eval.guidance_scales=1.0,",
        f"--config.eval.reference={tmp_path}/real.npz",
    ]
    assert main(train_arguments(workdir, *EVAL, *more)) == 0
    known = portable(open_npz(tmp_path / "real.npz").about)
    assert [*filter(None, compared)][::2] == [known, known]  # before the first step, and before the shares
    assert [set(values) for values in compared if values] == [set(known), {"extractor"}, set(known)]
    assert (workdir / f"evaluation/real_{'0' * 16}.npz").is_file()


def test_statistics_with_few_images_are_refused_before_training(tmp_path, tiny_inception):
    moments = {"mu": np.zeros(4), "sigma": np.eye(4)}
    np.savez(tmp_path / "features.npz", **moments, features=np.zeros((3, 4), np.float32))
    np.savez(tmp_path / "images.npz", **moments, arr_0=np.zeros((3, 8, 8, 1), np.uint8))
    for name in ("features.npz", "images.npz"):
        one = Reference(str(tmp_path / name), ("precision",), None, None, "config.eval.")
        with pytest.raises(InputError, match=rf"need 4 images .* there are 3 in config.eval.reference=.*{name}"):
            one.check(tiny_inception, (8, 8, 1))


def test_the_inception_score_looks_at_no_real_images():
    config = ClassifierConfig(8, 8, 1, num_classes=10, base_channels=4, features=8)
    extractor = build_classifier(initialize(config, seed=0))
    one = Reference("", ("is",), None, None)  # and nothing to read
    one.check(extractor, (8, 8, 1))
    assert one.statistics(extractor, (8, 8, 1), None).count == 0


def test_images_are_read_as_many_at_a_time_as_the_config_says(tmp_path, tiny_inception, monkeypatch):
    """The network's own batch size does not matter: the moments are summed over the whole block."""
    sizes, images = [], np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    few, found = dataclasses.replace(tiny_inception, batch_size=4), ArrayImages(images, {"shape": [8, 8, 1]})
    read = ArrayImages.read
    monkeypatch.setattr(ArrayImages, "read", lambda self, rows: (sizes.append(len(rows)), read(self, rows))[1])
    one = Reference("", ("fd",), None, lambda: found)
    found = one.statistics(few, (8, 8, 1), partial(compute_statistics, few, batch_size=32))
    assert sizes == [32, 8]
    assert found.gaussians.keys() == {"pool"}  # nobody has asked for sFID
    np.testing.assert_allclose(found.gaussians["pool"].mean, tiny_inception(images)["pool"].mean(axis=0), rtol=1e-5)


def test_a_runs_own_images_are_of_all_classes(monkeypatch):
    """Taking every n-th image could give images of one class only."""
    monkeypatch.setattr(reference, "MOST_REAL", 100)
    images = np.zeros((1000, 8, 8, 1), np.uint8) + (np.arange(1000) % 10).astype(np.uint8)[:, None, None, None]
    source = array_source(images, np.arange(1000) % 10, tuple("0123456789"))
    own = own_images("data", source, FrozenConfigDict({}), None)
    assert len(own) == 100
    assert len(np.unique(own.read(np.arange(100))[:, 0, 0, 0])) == 10


def test_what_was_seen_of_other_images_under_the_same_labels_is_not_used(tmp_path, tiny_inception):
    """Statistics of a data set that was repaired are computed anew, though the network is the same."""
    means, kept = [], []
    for value in (10, 20):
        np.savez(tmp_path / "data.npz", images=np.full((9, 8, 8, 1), value, np.uint8), labels=np.zeros(9, int))
        source = load_arrays(str(tmp_path / "data.npz"))
        one = Reference("", ("fd",), None, lambda source=source: own_images("x", source, FrozenConfigDict({}), None))
        found = one.statistics(tiny_inception, (8, 8, 1), partial(compute_statistics, tiny_inception, batch_size=32))
        means.append(found.gaussians["pool"].mean[0])
        kept.append(found.about["contents"])
        assert kept[-1].endswith(source.contents)
    assert means == pytest.approx([10 / 255, 20 / 255])
    assert kept[0] != kept[1]


def test_too_few_samples_are_warned_of():
    """The warnings give the FD that a perfect model would have with so few samples."""
    (note,) = few_images(("fd",), "inception", {"pool": 2048, "spatial": 2023}, 100, "config.eval.num_samples=100")
    assert "num_samples=100 are fewer than the 2048 features of inception: FID comes out too high" in note
    real = SimpleNamespace(extractor="inception", count=150, gaussians={"pool": Gaussian(np.zeros(200), np.eye(200))})
    real.gaussian = real.gaussians.get
    said = "\n".join(describe_bias(real, 100, ("fd",))[0])
    assert re.search(r"a perfect model would have FID \d+(\.\d)? with 100 samples", said)
    assert "the reference's 150 images are fewer than the 200 features of inception: FID comes out too high" in said


@pytest.mark.slow
def test_the_moving_average_is_what_is_evaluated(undisturbed, tmp_path, monkeypatch):
    """This holds after a step and for an evaluation that is repeated at a start."""
    seen, evaluate = [], evaluator.Evaluator.__call__

    def noting(self, step, parameters, say):
        seen.append(jax.device_get(parameters))
        return evaluate(self, step, parameters, say)

    monkeypatch.setattr(evaluator.Evaluator, "__call__", noting)
    workdir = tmp_path / "run"
    assert main(train_arguments(workdir, *EVAL)) == 0
    whole = (workdir / "metrics.jsonl").read_bytes()
    (workdir / "metrics.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert main(train_arguments(workdir, *EVAL)) == 0
    assert len(seen) == 3
    average, raw = (split(load_checkpoint(workdir, ema=ema))[1] for ema in (True, False))
    for parameters in seen[1:]:
        jax.tree.map(np.testing.assert_array_equal, parameters, average)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), average, raw)))


def test_gathered_parameters_lie_on_the_devices_for_all_batches(monkeypatch):
    """Several processes gather NumPy arrays, which would be copied to the devices for every batch."""
    seen = []
    one = evaluator.Evaluator.__new__(evaluator.Evaluator)
    one._config = FrozenConfigDict({"eval": {"guidance_scales": (1.0, 2.0), "solver": "euler", "steps": 2}})
    one._mesh, one._structure = make_mesh(), None
    one._prepare, one._deciding_settings, one._folder = lambda: (None, None), lambda *given: {}, Path()
    one._evaluate = lambda extractor, real, model, scale: seen.append(model) or {}
    monkeypatch.setattr(evaluator, "run_on_process_0", lambda action: None)
    monkeypatch.setattr(evaluator, "merge", lambda structure, parameters: parameters)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gathered = lambda tree, tiled: jax.device_get(tree)  # noqa: E731
    monkeypatch.setattr(evaluator.multihost_utils, "process_allgather", gathered)
    assert one(4, {"weight": jax.numpy.arange(3.0)}, print) == {}
    assert seen[0]["weight"].sharding == replicated(one._mesh)
    np.testing.assert_array_equal(seen[0]["weight"], [0.0, 1.0, 2.0])


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "fsdp"), [(1, 4, 2), (2, 2, 4)])
def test_many_devices_evaluate_as_one_does(undisturbed, tmp_path, processes, devices, fsdp):
    """Each device draws its share, moments and features are merged, and the metrics equal those of one device."""
    workdir = tmp_path / "run"
    process = launch(processes, devices, "train", *train_arguments(workdir, *EVAL, f"--config.mesh.fsdp={fsdp}"))
    stdout, _ = process.communicate(timeout=600)
    assert process.returncode == 0, stdout
    together, alone = lines(workdir), lines(undisturbed)
    assert [line.keys() for line in together] == [line.keys() for line in alone]
    for ours, theirs in zip(together, alone, strict=True):
        if "loss" not in ours:
            assert ours == pytest.approx(theirs, rel=1e-3, abs=0.04)  # less than one of 24 samples
