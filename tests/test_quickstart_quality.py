"""The quickstart's model draws the digits it is asked for, according to a classifier trained on other real digits."""

import json

import jax
import numpy as np
import pytest
from sklearn.svm import SVC

import mpdit_jax as mp
from mpdit_jax.data.sources import load_source
from mpdit_jax.io.pictures import to_uint8
from tests.tiny import OPTIMIZED, ROOT, optimized, run


def features(images):
    """Convert uint8 images in [0, 255] to vectors in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def real(split):
    source = load_source("digits", "", split)
    batch = source.batch(np.arange(len(source)))
    return features(to_uint8(batch["x"])), batch["y"]


HALF = ["--config.data.split=train", "--config.sample.every=0"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Train as the quickstart does, on one half of the digits."""
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    arguments = [f"--config={ROOT / 'configs/digits.py'}", f"--workdir={workdir}", *HALF, "--config.eval.every=0"]
    process = run("train", arguments, extra=OPTIMIZED)  # 800 real steps
    assert process[0] == 0, process[2]
    return workdir


@pytest.fixture(scope="module")
def judge():
    """A classifier trained on the other half."""
    judge = SVC(C=10, gamma=0.3).fit(*real("test"))
    assert judge.score(*real("train")) >= 0.98
    return judge


@pytest.mark.slow
def test_guided_samples_show_the_digit_asked_for(quickstart, judge):
    labels = np.repeat(np.arange(10), 20)
    model = mp.load_checkpoint(quickstart)
    with optimized():
        latents = mp.make_sampler(steps=50, guidance_scale=2.0)(model, labels, jax.random.key(0))
    drawn = features(to_uint8(np.asarray(latents)))
    assert judge.score(drawn, labels) >= 0.95
    # Not copies of one image a class, and not copies of the training set.
    for digit in range(10):
        assert len(np.unique(drawn[labels == digit].round(1), axis=0)) == 20
    distances = np.linalg.norm(drawn[:, None] - real("train")[0][None], axis=-1).min(axis=1)
    assert np.median(distances) > 0.3


@pytest.mark.slow
def test_a_flow_map_draws_the_digits_in_one_evaluation(quickstart, judge, tmp_path):
    """200 steps after the quickstart. One Euler step of that model alone passes the first limit, with recall 0."""
    workdir = tmp_path / "map"
    arguments = [f"--config={ROOT / 'configs/digits_flow_map.py'}", f"--workdir={workdir}", *HALF]
    arguments += [f"--config.init_from={quickstart}", "--config.eval.every=200", "--config.eval.num_samples=500"]
    process = run("train", arguments, extra=OPTIMIZED)
    assert process[0] == 0, process[2]
    labels = np.repeat(np.arange(10), 50)
    with optimized():
        latents = mp.make_sampler("flow_map", steps=1)(mp.load_checkpoint(workdir), labels, jax.random.key(0))
    assert judge.score(features(to_uint8(np.asarray(latents))), labels) >= 0.95
    *_, last = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert last["step"] == 200
    assert last["eval/recall(classifier)/guidance_1"] >= 0.4
