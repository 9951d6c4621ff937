"""The quickstart's model draws the digits it is asked for, according to a classifier trained on other real digits."""

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


@pytest.mark.slow
def test_guided_samples_show_the_digit_asked_for(tmp_path):
    """Train as the quickstart does, on one half of the digits; the classifier is trained on the other."""
    config = f"--config={ROOT / 'configs/digits.py'}"
    arguments = [config, f"--workdir={tmp_path / 'run'}", "--config.data.split=train", "--config.sample.every=0"]
    arguments.append("--config.eval.every=0")
    process = run("train", arguments, extra=OPTIMIZED)  # 800 real steps
    assert process[0] == 0, process[2]

    judge = SVC(C=10, gamma=0.3).fit(*real("test"))
    assert judge.score(*real("train")) >= 0.98

    labels = np.repeat(np.arange(10), 20)
    model = mp.load_checkpoint(tmp_path / "run")
    with optimized():
        latents = mp.make_sampler(steps=50, guidance_scale=2.0)(model, labels, jax.random.key(0))
    drawn = features(to_uint8(np.asarray(latents)))
    assert judge.score(drawn, labels) >= 0.95
    # Not copies of one image a class, and not copies of the training set.
    for digit in range(10):
        assert len(np.unique(drawn[labels == digit].round(1), axis=0)) == 20
    distances = np.linalg.norm(drawn[:, None] - real("train")[0][None], axis=-1).min(axis=1)
    assert np.median(distances) > 0.3
