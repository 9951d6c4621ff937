"""`prepare` reads data sets that TFDS has prepared."""

import sys

import numpy as np
import pytest
from PIL import Image

from mpdit_jax.data.latent_store import LatentStore
from mpdit_jax.errors import DataError, MissingExtraError
from mpdit_jax.prepare.__main__ import main
from tests.prepare.conftest import arguments
from tests.tiny import run


def test_tfds_names_its_extra(tmp_path, vae_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(MissingExtraError, match=r"mpdit_jax with its extra \[tfds\]"):
        main(arguments("tfds:imagenet2012", vae_folder, tmp_path / "out"))


@pytest.fixture
def tfds_data(tmp_path, monkeypatch):
    """Return a function that writes a data set called `tiny` as TFDS does, without TensorFlow."""
    from io import BytesIO

    import tensorflow_datasets as tfds
    from sklearn import datasets

    pictures = datasets.load_digits().images

    def write(labels):
        def png(index):
            file = BytesIO()
            Image.fromarray((pictures[index] * 15.9).astype(np.uint8)).convert("RGB").save(file, "PNG")
            file.seek(0)
            return file

        class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                image, label = tfds.features.Image(shape=(8, 8, 3)), tfds.features.ClassLabel(names=["cat", "dog"])
                features = tfds.features.FeaturesDict({"image": image, "label": label})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for index, label in enumerate(labels):
                    yield index, {"image": png(index), "label": label}

        Tiny(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
        # TFDS looks for data sets that are files alone in this folder when it is imported.
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))

    return write


@pytest.mark.parity
def test_a_tfds_data_set(tfds_data, vae_folder, tmp_path):
    from sklearn import datasets

    from mpdit_jax.vae import load_vae

    labels = [0, 1, 1, 0, 1, 0, 1]
    tfds_data(labels)
    status, stdout, stderr = run("prepare", arguments("tfds:tiny", vae_folder, tmp_path / "out"))
    assert status == 0, stderr
    assert "7 images of 2 classes" in stdout
    store = LatentStore(tmp_path / "out")
    assert store.manifest.class_names == ("cat", "dog")
    assert store.manifest.class_counts == (3, 4)
    records = store.read(np.arange(7))
    assert records["key"].tolist() == [f"train/{index}".encode() for index in range(7)]
    # TFDS shuffles what it writes: each latent must be that of one picture, with that picture's label.
    pixels = (datasets.load_digits().images[:7] * 15.9).astype(np.uint8)[..., None].astype(np.float32) / 127.5 - 1
    mean = np.asarray(load_vae(vae_folder).encode(pixels)[0])
    distances = np.abs(records["mean"][:, None, 0].astype(np.float32) - mean[None]).max(axis=(2, 3, 4))
    found = distances.argmin(axis=1)
    assert sorted(found) == list(range(7))
    assert distances.min(axis=1).max() < 2e-3 * np.abs(mean).max()
    assert records["label"].tolist() == [labels[index] for index in found]


@pytest.mark.parity
@pytest.mark.parametrize("name", ["tiny", "no_such_data_set"])
def test_a_tfds_data_set_that_is_not_there(name, vae_folder, tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=rf"tfds:{name}:train cannot be opened .*--file_format=array_record"):
        main(arguments(f"tfds:{name}", vae_folder, tmp_path / "out"))


@pytest.mark.parity
def test_a_tfds_label_of_no_class_is_rejected_by_name(tfds_data, vae_folder, tmp_path):
    tfds_data([0, 1, -1])
    status, _, stderr = run("prepare", arguments("tfds:tiny", vae_folder, tmp_path / "out"))
    assert status == 1
    assert "1 of 3 images were rejected" in stderr
    assert "label -1 is outside 0 to 1" in stderr
    assert "Traceback" not in stderr
