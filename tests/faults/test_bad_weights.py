"""Damaged files of weights, samples, features and statistics, in bulk, are read or refused by our own errors."""

import json

import numpy as np
import pytest

from mpdit_jax.data.image_sets import ArrayImages, open_npz
from mpdit_jax.errors import ConfigError, InputError, WeightsError
from mpdit_jax.evaluate.classifier import ClassifierConfig, initialize, load_classifier, save_classifier
from mpdit_jax.evaluate.extractors import build_classifier
from mpdit_jax.evaluate.stored_statistics import holds_statistics, load_statistics, save_statistics
from mpdit_jax.interop.native_files import save_native, stored_step
from mpdit_jax.interop.torch_weights import load_with_metadata
from mpdit_jax.io.npz_blocks import NpzBlocks
from mpdit_jax.vae.weights import load_folder
from tests.evaluate.conftest import collect
from tests.faults.damage import MUTATIONS, json_survives, survives
from tests.flow.toys import tiny_model
from tests.prepare.conftest import make_vae

FEW = MUTATIONS // 12


@pytest.fixture(scope="module")
def extractor():
    return build_classifier(initialize(ClassifierConfig(8, 8, 1, 10, base_channels=4, features=8), 0), batch_size=4)


@pytest.fixture(scope="module")
def images():
    return ArrayImages(np.random.default_rng(0).integers(0, 255, (12, 8, 8, 1), np.uint8), {"path": "drawn"})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["mapped", "compressed"])
def test_samples(tmp_path, save):
    path = tmp_path / "samples.npz"
    save(path, arr_0=np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1))
    survives(path, path.read_bytes(), lambda path: np.array(open_npz(path).images), InputError, count=FEW)


def test_statistics(tmp_path, extractor, images):
    path = tmp_path / "statistics.npz"
    save_statistics(path, collect(extractor, [extractor(images.images)], {}), features=True)

    def read(path):
        holds_statistics(path, extractor.name)
        return load_statistics(path, extractor)

    survives(path, path.read_bytes(), read, InputError, count=FEW)


def test_unfinished_features(tmp_path):
    folder = NpzBlocks(tmp_path / "features", ["pool"])
    folder.write(0, {"pool": np.zeros((4, 8), np.float32)})
    (path,) = folder.folder.iterdir()
    survives(path, path.read_bytes(), lambda path: folder.read(0), InputError, count=FEW)


def test_a_classifier(tmp_path):
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, initialize(ClassifierConfig(4, 4, 1, 2, base_channels=2, features=2), 0))
    survives(path, path.read_bytes(), load_classifier, WeightsError, count=FEW)


@pytest.mark.slow
def test_a_vae(tmp_path):
    folder = make_vae(tmp_path / "vae", seed=0)
    errors = (ConfigError, WeightsError)
    json_survives(folder / "config.json", lambda: load_folder(folder), errors, count=FEW // 4)
    path = folder / "diffusion_pytorch_model.safetensors"
    survives(path, path.read_bytes(), lambda path: load_folder(folder), errors, count=FEW // 12)


@pytest.mark.parametrize("entries", [
    {"layers_per_block": 2**31}, {"block_out_channels": [8] * 10_000}, {"block_out_channels": [2**40, 2**40]},
    {"latent_channels": 2**64}, {"block_out_channels": [65536] * 4, "norm_num_groups": 32},
])  # fmt: skip
def test_a_vae_larger_than_any_machine(tmp_path, entries):
    folder = make_vae(tmp_path / "vae", seed=0)
    stored = json.loads((folder / "config.json").read_text())
    for name in ("down_block_types", "up_block_types"):
        del stored[name]
    (folder / "config.json").write_text(json.dumps(stored | entries))
    with pytest.raises((ConfigError, WeightsError), match=r"expected|does not fit"):
        load_folder(folder)


def test_a_classifier_larger_than_any_machine(tmp_path):
    path = tmp_path / "classifier.safetensors"
    model = initialize(ClassifierConfig(4, 4, 1, 2, base_channels=2, features=2), 0)
    model.config = ClassifierConfig(4, 4, 1, 2, base_channels=2**19, features=2**19)
    save_classifier(path, model)
    with pytest.raises(WeightsError, match="numbers and its architecture has"):
        load_classifier(path)


def test_a_model_of_ours(tmp_path):
    """A damaged file of our own weights is read, or refused, also when it is no longer recognized as ours."""
    path = tmp_path / "model.safetensors"
    save_native(path, tiny_model(), 3)

    def read(path):
        model, metadata = load_with_metadata(path, num_heads=2)
        stored_step(metadata)
        return model

    survives(path, path.read_bytes(), read, (WeightsError, ConfigError), count=FEW // 2)
