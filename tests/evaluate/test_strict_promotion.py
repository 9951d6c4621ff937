"""The networks of evaluation do not depend on JAX's implicit promotion of dtypes and ranks."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mpdit_jax.evaluate.classifier import ClassifierConfig, initialize
from mpdit_jax.evaluate.classifier_training import train_classifier
from mpdit_jax.evaluate.efficientnet import EfficientNetLite0
from mpdit_jax.evaluate.extractors import _apply_classifier, _apply_efficientnet, _apply_inception
from mpdit_jax.evaluate.inception import Inception


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("make", "apply", "features"), [
    (Inception, lambda *both: _apply_inception("tensorflow", *both), 2048),
    (Inception, lambda *both: _apply_inception("pytorch_fid", *both), 2048),
    (EfficientNetLite0, lambda *both: _apply_efficientnet(64, *both), 1280),
    (lambda: initialize(ClassifierConfig(8, 8, 3, 10), 0), _apply_classifier, 64),
], ids=["inception", "pytorch_fid", "efficientnet", "classifier"])  # fmt: skip
def test_networks(channels, make, apply, features):
    shape = (2, 8, 8, 3 if features == 64 else channels)
    found = nnx.eval_shape(lambda: apply(make(), jnp.zeros(shape, jnp.uint8)))
    assert found["pool"].shape == (2, features)


def test_training_of_a_classifier(digits):
    images, labels = digits
    _, accuracy = train_classifier(lambda rows: images[rows] / 127.5 - 1, labels, 10, steps=2, quiet=True)
    assert 0 <= accuracy <= 1
