"""The small classifier learns, its file is checked, and its command reports."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from mpdit_jax import train_classifier as command
from mpdit_jax.errors import InputError, WeightsError
from mpdit_jax.evaluate.classifier import load_classifier, save_classifier
from mpdit_jax.evaluate.extractors import build_classifier, make_extractor, metric_label
from tests.tiny import refusal


def test_it_tells_the_digits_apart(classifier):
    assert classifier[1] > 0.9


def test_the_file_gives_the_same_features(extractor, classifier_file, digits):
    loaded = make_extractor(f"classifier:{classifier_file}", batch_size=256)
    assert loaded.fingerprint == extractor.fingerprint
    first, second = extractor(digits[0][:300]), loaded(digits[0][:300])
    np.testing.assert_array_equal(first["pool"], second["pool"])
    np.testing.assert_allclose(first["probs"].sum(axis=1), 1, rtol=1e-5)
    assert metric_label("fd", loaded.name) == "FD(classifier)"
    assert metric_label("is", loaded.name) == "IS(classifier)"


def test_home_is_the_users_behind_the_colon_too(extractor, classifier_file):
    place = f"~/{os.path.relpath(classifier_file, Path.home())}"
    assert make_extractor(f"classifier:{place}", batch_size=256).fingerprint == extractor.fingerprint
    with pytest.raises(InputError, match="~nobody_here/c: this machine knows no home folder"):
        make_extractor("classifier:~nobody_here/c")


def test_features_do_not_depend_on_the_batch(classifier, extractor, digits):
    alone = build_classifier(classifier[0], batch_size=1)(digits[0][:3])["pool"]
    np.testing.assert_allclose(alone, extractor(digits[0][:3])["pool"], rtol=1e-4, atol=1e-4)


def test_the_command_trains_the_same_file_twice(tmp_path, monkeypatch, capsys):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        assert command.main(["--data=digits", f"--out={path}", "--steps=3"]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "on held-out images" in capsys.readouterr().out


def test_damaged_files_and_wrong_images_are_named(tmp_path, classifier, extractor, digits):
    with pytest.raises(WeightsError, match="no such file; train one with"):
        load_classifier(tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, other)
    with pytest.raises(WeightsError, match="not a classifier that"):
        load_classifier(other)
    path = tmp_path / "short.safetensors"
    save_classifier(path, classifier[0])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="train it again"):
        load_classifier(path)
    about = {"format": "classifier 1", "height": 8, "width": 8, "channels": 1, "num_classes": 10}
    metadata = {"mpdit_jax": json.dumps(about)}
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, other, metadata=metadata)
    with pytest.raises(WeightsError, match="holds 3 numbers and its architecture has"):
        load_classifier(other)
    with pytest.raises(InputError, match=r"images are \(16, 8, 1\) and this classifier was trained on \(8, 8, 1\)"):
        extractor(np.zeros((2, 16, 8, 1), np.uint8))
    with pytest.raises(InputError, match="dtype float32: expected uint8"):
        extractor(digits[0][:2].astype(np.float32))


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--data=nothing", "--out=x.safetensors"], "--data=nothing: expected one of digits"),
    (["--data=digits", "--out=x.pth"], "expected a name that ends in .safetensors"),
    (["--out=x.safetensors"], "give either --data=NAME or --images=FOLDER"),
    (["--data=digits", "--out=x.safetensors", "--steps=0"], "steps=0"),
    (["--images=/nothing", "--out=x.safetensors"], "no such file or folder"),
])  # fmt: skip
def test_bad_arguments_are_one_sentence(arguments, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(command.main, arguments, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())
    assert sys.argv[0] == "command"
