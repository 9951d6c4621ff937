"""FID's Inception equals both PyTorch ports on random weights, and its files are read and checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mpdit_jax.errors import WeightsError
from mpdit_jax.evaluate import inception_weights
from mpdit_jax.evaluate.extractors import build_inception
from mpdit_jax.evaluate.inception import Inception
from mpdit_jax.evaluate.inception_weights import convert_inception, from_torch, load_inception, locate_inception
from mpdit_jax.evaluate.layers import average_pool, max_pool
from mpdit_jax.evaluate.resize import bilinear_weights, resize
from tests.conftest import relative_error
from tests.evaluate.torch_references import import_torchvision

TOLERANCE = 1e-4


def test_outputs_have_the_published_sizes():
    found = jax.eval_shape(lambda x: Inception()(x), jax.ShapeDtypeStruct((2, 299, 299, 3), np.float32))
    assert [array.shape for array in found] == [(2, 2048), (2, 2023), (2, 1008), (2, 1008)]


def test_average_pool_leaves_the_padding_out():
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 3)).astype(np.float32)
    expected = np.empty_like(x)
    for i in range(4):
        for j in range(5):
            expected[:, i, j] = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean(axis=(1, 2))
    np.testing.assert_allclose(average_pool(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stride", "padding"), [(1, "SAME"), (2, "SAME"), (2, "VALID")])
@pytest.mark.parametrize("size", [(7, 8), (8, 9)])
def test_max_pool_is_that_of_windows(size, stride, padding):
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    windows = jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)
    np.testing.assert_array_equal(max_pool(x, stride, padding), windows)


def test_bilinear_from_corners_and_from_pixel_centres():
    np.testing.assert_allclose(bilinear_weights(2, 4, half_pixel=False), [[1, 0], [0.5, 0.5], [0, 1], [0, 1]])
    np.testing.assert_allclose(bilinear_weights(2, 4, half_pixel=True), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    x = np.random.default_rng(0).standard_normal((1, 6, 9, 2)).astype(np.float32)
    assert resize(x, 12, half_pixel=False).shape == (1, 12, 12, 2)
    np.testing.assert_allclose(resize(x, 12, half_pixel=False)[:, ::2, 0], x[:, :, 0], rtol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("size", [256, 300])
def test_pixel_centres_lie_where_pytorch_has_them(size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).integers(0, 256, (1, size, size, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), size=(299, 299), mode="bilinear", align_corners=False
    )
    found = np.asarray(resize(x, 299, half_pixel=True)).transpose(0, 3, 1, 2)
    assert np.abs(found - theirs.numpy()).max() < 1e-3  # of 255


@pytest.mark.parity
@pytest.mark.parametrize("size", [(512, 512), (300, 768), (72, 72)])
def test_corners_lie_where_torch_fidelity_has_them(size):
    """Reductions, which pass over pixels, and enlargements sample where torch-fidelity does."""
    import_torchvision()
    port = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    import torch

    x = np.random.default_rng(0).integers(0, 256, (1, *size, 3)).astype(np.float32)
    theirs = port.interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), size=(299, 299), align_corners=False
    )
    found = np.asarray(resize(x, 299, half_pixel=False)).transpose(0, 3, 1, 2)
    assert np.abs(found - theirs.numpy()).max() < 1e-3  # of 255


def test_weights_of_another_network_are_named(inception_state):
    lacking = {name: array for name, array in inception_state.items() if name != "Mixed_6d.branch7x7_2.bn.bias"}
    with pytest.raises(WeightsError, match=r"Mixed_6d.branch7x7_2.bn.bias is missing"):
        from_torch(lacking, "x.pth")
    with pytest.raises(WeightsError, match="1,000 classes"):
        from_torch(inception_state | {"fc.weight": np.zeros((1000, 2048), np.float32)}, "x.pth")
    with pytest.raises(WeightsError, match="entry extra has no place"):
        from_torch(inception_state | {"extra": np.zeros(3)}, "x.pth")
    broken = inception_state["Mixed_5b.branch1x1.conv.weight"].copy()
    broken[0, 0] = np.nan
    with pytest.raises(WeightsError, match=r"Mixed_5b.branch1x1.conv.weight \(64, 192, 1, 1\) holds NaN"):
        from_torch(inception_state | {"Mixed_5b.branch1x1.conv.weight": broken}, "x.pth")


def test_missing_weights_say_what_to_download_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(inception_weights, "CACHE", tmp_path)
    monkeypatch.delenv("MPDIT_JAX_INCEPTION", raising=False)
    for path in ("", str(tmp_path / "none.pth")):
        with pytest.raises(WeightsError, match=r"download pt_inception-2015-12-05-6726825d\.pth .* or give its path"):
            locate_inception(path)
    (tmp_path / "weights-inception-2015-12-05-6726825d.pth").touch()
    assert locate_inception() == tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    (tmp_path / "mine.pth").touch()
    monkeypatch.setenv("MPDIT_JAX_INCEPTION", str(tmp_path / "mine.pth"))
    assert locate_inception() == tmp_path / "mine.pth"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_inception("~/mine.pth") == tmp_path / "mine.pth"


def test_a_safetensors_of_the_weights_is_the_same_network(tmp_path, inception_state):
    source = tmp_path / "with_more.safetensors"
    safetensors.numpy.save_file(inception_state | {"AuxLogits.fc.bias": np.zeros(3, np.float32)}, source)
    convert_inception(source, tmp_path / "weights.safetensors")
    first, second = (build_inception(load_inception(p)) for p in (source, tmp_path / "weights.safetensors"))
    assert first.fingerprint == second.fingerprint
    assert (
        build_inception(from_torch(inception_state, ""), preprocessing="pytorch_fid").fingerprint != first.fingerprint
    )
    assert not [name for name in safetensors.numpy.load_file(tmp_path / "weights.safetensors") if "Aux" in name]


@pytest.fixture(scope="module")
def images():
    # Coarse shapes as in photographs, not noise alone, at no multiple of 299.
    coarse = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.float32)
    return np.asarray(jax.image.resize(coarse, (2, 72, 72, 3), "cubic")).clip(0, 255).astype(np.uint8)


def torch_state(inception_state):
    import torch

    return {name: torch.from_numpy(np.asarray(array)) for name, array in inception_state.items()}


@pytest.mark.parity
def test_a_safetensors_of_a_published_file_is_the_same_network(tmp_path, inception_state):
    """The published .pth has batch counters and an auxiliary head that our network lacks."""
    torch = pytest.importorskip("torch")
    source, target = tmp_path / "published.pth", tmp_path / "weights.safetensors"
    state = {name: array.astype(np.float32) for name, array in inception_state.items() if array.dtype != np.int64}
    counters = {name: array for name, array in inception_state.items() if array.dtype == np.int64}
    torch.save(torch_state(state | counters) | {"AuxLogits.fc.bias": torch.zeros(3)}, source)
    convert_inception(source, target)
    kept = safetensors.numpy.load_file(target)
    assert counters
    assert kept.keys() == state.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)
    fingerprints = {build_inception(load_inception(path)).fingerprint for path in (source, target)}
    assert fingerprints == {build_inception(from_torch(state, "")).fingerprint}


@pytest.mark.slow
@pytest.mark.parity
def test_parity_with_torch_fidelity(tmp_path, inception_state, images):
    import_torchvision()
    pytest.importorskip("torch_fidelity")
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path / "weights-inception.pth"
    torch.save(torch_state(inception_state), path)
    wanted = ["2048", "logits_unbiased", "logits"]
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", wanted, feature_extractor_weights_path=str(path)).eval()
    with torch.no_grad():
        pool, unbiased, logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    model = load_inception(path)
    found = build_inception(model, batch_size=2)(images)
    assert found["pool"].std() > 0.1
    assert relative_error(found["pool"], pool) < TOLERANCE
    assert relative_error(found["probs"], torch.softmax(unbiased, dim=1)) < TOLERANCE
    out = model((resize(jnp.asarray(images, jnp.float32), 299, half_pixel=False) - 128) / 128)
    assert np.abs(inception_state["fc.bias"]).max() > 10 * TOLERANCE * np.abs(logits.numpy()).max()
    assert relative_error(out.unbiased_logits, unbiased) < TOLERANCE
    assert relative_error(out.logits, logits) < TOLERANCE


@pytest.mark.parity
def test_parity_with_pytorch_fid_and_its_spatial_features(monkeypatch, inception_state, images):
    import_torchvision()
    port = pytest.importorskip("pytorch_fid.inception")
    import torch

    monkeypatch.setattr(port, "load_state_dict_from_url", lambda *args, **kwargs: torch_state(inception_state))
    theirs = port.InceptionV3([3]).eval()
    seen = []
    # TensorFlow's mixed_6/conv: the 1x1 branch of the third block of 17x17, after its ReLU.
    block = [module for module in theirs.modules() if hasattr(module, "branch7x7dbl_5")][2]
    block.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        (pool,) = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255)
    found = build_inception(from_torch(inception_state, ""), preprocessing="pytorch_fid", batch_size=2)(images)
    assert relative_error(found["pool"], pool[:, :, 0, 0]) < TOLERANCE
    spatial = seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert spatial.shape == (2, 2023)
    assert relative_error(found["spatial"], spatial) < TOLERANCE
