import jax
import numpy as np
import pytest
from flax import nnx

from mpdit_jax.evaluate.classifier import save_classifier
from mpdit_jax.evaluate.classifier_training import train_classifier
from mpdit_jax.evaluate.extractors import _build, build_classifier
from mpdit_jax.evaluate.moments import Moments
from mpdit_jax.evaluate.statistics import from_moments
from tests.evaluate.torch_references import random_inception_state


def collect(extractor, parts, about):
    """Return the statistics of features that come in parts, with the features of every image."""
    parts = list(parts)
    moments, joined = {}, {}
    for name in extractor.outputs:
        joined[name] = np.concatenate([part[name] for part in parts])
        if name != "probs":
            moments[name] = Moments.empty(extractor.outputs[name])
            for part in parts:
                moments[name] = moments[name].update(part[name])
    return from_moments(extractor, moments, joined["pool"], joined.get("probs"), about)


@pytest.fixture(scope="session")
def digits():
    """Return the digits as uint8 (1797, 8, 8, 1), and their labels."""
    from mpdit_jax.data.sources import load_digits
    from mpdit_jax.io.pictures import to_uint8

    source = load_digits()
    return to_uint8(source.batch(np.arange(len(source)))["x"]), source.labels


@pytest.fixture(scope="session")
def classifier(digits):
    """Return a classifier trained on the digits, and its accuracy."""
    images, labels = digits
    return train_classifier(lambda rows: images[rows] / np.float32(127.5) - 1, labels, 10, steps=300, quiet=True)


@pytest.fixture(scope="session")
def extractor(classifier):
    return build_classifier(classifier[0], batch_size=256)


@pytest.fixture(scope="session")
def classifier_file(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "digits.safetensors"
    save_classifier(path, classifier[0])
    return path


class _Means(nnx.Module):
    """Stands for Inception with one parameter."""

    def __init__(self):
        self.scale = nnx.Param(jax.numpy.ones(()))


@pytest.fixture(scope="session")
def tiny_inception():
    """Return an extractor named inception with 4 pool and 3 spatial features."""

    def apply(model, images):
        x = images.astype(jax.numpy.float32) * model.scale[...] / 255
        pool = jax.numpy.stack([x.mean((1, 2, 3)), x.std((1, 2, 3)), x[:, 0, 0, 0], x[:, 3, 3, 0]], axis=1)
        return {"pool": pool, "spatial": x[:, 2, 2:5, 0], "probs": jax.nn.softmax(8 * pool)}

    return _build("inception", _Means(), apply, {"pool": 4, "spatial": 3, "probs": 4}, {}, 256)


@pytest.fixture(scope="session")
def inception_state():
    return random_inception_state()
