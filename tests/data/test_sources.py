import gzip
import struct

import numpy as np
import pytest

from mpdit_jax.data.sources import array_source, check_fits, load_source
from mpdit_jax.errors import DataError, DataWarning
from mpdit_jax.io.idx import read_idx


def idx_bytes(array):
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A folder with a small Fashion-MNIST: training files gzipped, test files not."""
    random = np.random.default_rng(0)
    for stem, count in (("train", 40), ("t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
            if stem == "train":
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
            else:
                (tmp_path / name).write_bytes(idx_bytes(array))
    return tmp_path


def test_digits():
    digits = load_source("digits", "", "all")
    assert (len(digits), digits.shape, len(digits.class_names)) == (1797, (8, 8, 1), 10)
    batch = digits.batch(np.arange(1797))
    assert batch["x"].dtype == np.float32
    assert batch["y"].dtype == np.int32
    assert (batch["x"].min(), batch["x"].max()) == (-1, 1)


def test_digits_halves_are_disjoint_and_balanced():
    halves = [load_source("digits", "", split) for split in ("train", "test")]
    assert sum(map(len, halves)) == 1797
    counts = [np.bincount(half.labels) for half in halves]
    assert abs(counts[0] - counts[1]).max() <= 1
    whole = load_source("digits", "", "all")
    together = np.concatenate([half.batch(np.arange(len(half)))["x"] for half in halves])
    everything = whole.batch(np.arange(len(whole)))["x"]
    assert sorted(map(bytes, together)) == sorted(map(bytes, everything))


def test_fashion_mnist_is_padded_to_32(fashion):
    for split, count in (("train", 40), ("test", 20)):
        source = load_source("fashion_mnist", str(fashion), split)
        assert (len(source), source.shape) == (count, (32, 32, 1))
        images = source.batch(np.arange(count))["x"]
        assert (images[:, :2] == -1).all()
        assert (images[:, :, -2:] == -1).all()
        assert images[:, 2:-2, 2:-2].max() == 1
    assert source.class_names[9] == "Ankle boot"


def test_missing_fashion_mnist_says_both_ways(tmp_path):
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist.*--config\.data\.path=FOLDER"):
        load_source("fashion_mnist", str(tmp_path), "train")


@pytest.mark.parametrize(("damage", "sentence"), [
    (lambda data: data[:-1], "holds 783"),
    (lambda data: data + b"x", "holds more"),
    (lambda data: data[:7], "ends inside its header"),
    (lambda data: b"\x89PNG" + data[4:], "not an IDX file"),
    (lambda data: data[:2] + b"\x0d" + data[3:], "not an IDX file of unsigned bytes"),
    (lambda data: data[:4] + b"\xff" * 12 + data[16:], "claims shape"),
    (lambda data: b"", "not an IDX file"),
])  # fmt: skip
def test_damaged_idx(tmp_path, damage, sentence):
    data = idx_bytes(np.zeros((1, 28, 28), np.uint8))
    (tmp_path / "file").write_bytes(damage(data))
    with pytest.raises(DataError, match=sentence):
        read_idx(tmp_path / "file")


def test_truncated_gzip(tmp_path):
    whole = gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, (9, 28, 28), np.uint8)))
    (tmp_path / "file.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "file.gz")


def test_own_arrays(tmp_path):
    path = tmp_path / "mine.npz"
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 8, 3), np.uint8)
    np.savez(path, images=images, labels=np.array([0, 1, 2, 0, 1, 2]))
    source = load_source("arrays", str(path), "train")
    assert (len(source), source.shape, source.class_names) == (6, (4, 8, 3), ("0", "1", "2"))
    np.testing.assert_allclose(source.batch(np.array([3]))["x"][0], images[3] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(("arrays", "sentence"), [
    ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2, int)}, r"\(N, H, W, C\)"),
    ({"images": np.zeros((2, 4, 4, 1), np.float64), "labels": np.zeros(2, int)}, r"give images\.astype\(np\.float32"),
    ({"images": np.zeros((2, 4, 4, 1), np.int64), "labels": np.zeros(2, int)}, r"give images\.astype\(np\.uint8"),
    ({"images": np.zeros((2, 4, 4, 1), np.uint8), "labels": np.zeros(3, int)}, r"labels \(3,\)"),
    ({"images": np.zeros((2, 4, 4, 1), np.uint8), "labels": np.zeros(2)}, "whole numbers"),
    ({"images": np.zeros((2, 4, 4, 1), np.uint8), "labels": np.array([0, -1])}, "label -1"),
    ({"images": np.zeros((2, 4, 4, 1), np.uint8), "labels": np.array([0, 2**32 - 1])}, "label 4294967295 is too large"),
    ({"images": np.zeros((0, 4, 4, 1), np.uint8), "labels": np.zeros(0, int)}, "no images"),
    ({"images": np.zeros((2, 3, 8, 8), np.uint8), "labels": np.zeros(2, int)}, r"give images\.transpose\(0, 2, 3, 1\)"),
    ({"images": np.zeros((2, 1, 8, 6), np.uint8), "labels": np.zeros(2, int)}, "the channels are first"),
    ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(2, int)}, r"images\[\.\.\., None\] for grey"),
    ({"images": np.full((2, 4, 4, 3), 200, np.float32), "labels": np.zeros(2, int)}, "from 200 to 200;.*127.5 - 1"),
    ({"images": np.full((2, 4, 4, 1), 0.5, np.float32), "labels": np.zeros(2, int)}, r"give images \* 2 - 1"),
    ({"images": np.full((2, 4, 4, 4), 0.5, np.float32), "labels": np.zeros(2, int)}, "without the channel of opacity"),
    ({"images": np.full((2, 4, 4, 1), -1.5, np.float32), "labels": np.zeros(2, int)}, "rescale them"),
    ({"images": np.full((2, 4, 4, 8), 99, np.float32), "labels": np.zeros(2, int)}, "give images / 127.5 - 1"),
    ({"pictures": np.zeros((2, 4, 4, 1), np.uint8)}, "`images` and `labels`"),
    ({"images": np.array([[object()]]), "labels": np.zeros(1, int)}, "`images` and `labels`"),  # needs a pickle
])  # fmt: skip
def test_unusable_arrays(tmp_path, arrays, sentence):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=sentence):
        load_source("arrays", str(path), "train")


@pytest.mark.parametrize("shape", [(8, 8, 3), (4, 4, 128), (2, 8, 3), (16, 16, 4), (3, 3, 3)])
def test_possible_layouts_are_accepted(tmp_path, shape):
    images = np.full((2, *shape), 1 if shape[2] == 3 else 7, np.float32)
    images[0] = -images[0]
    np.savez(tmp_path / "mine.npz", images=images, labels=np.zeros(2, int))
    assert load_source("arrays", str(tmp_path / "mine.npz"), "train").shape == shape


def test_classes_without_examples_and_labels_from_1_are_named():
    def source(labels):
        labels = np.array(labels, np.uint64)  # not the type that counting takes
        return array_source(np.zeros((len(labels), 8, 8, 1), np.uint8), labels, tuple(map(str, range(max(labels) + 1))))

    from_1 = r"\(labels run from 1 to 3 and seem to start at 1: store labels - 1\)"
    with pytest.raises(DataError, match=rf"4 classes and the model 3 {from_1}: set model\.num_classes=4"):
        check_fits(source([1, 2, 3]), (8, 8, 1), 3)
    with pytest.warns(DataWarning, match=rf"1 of 4 classes have no examples and are not trained \(0\) {from_1}"):
        check_fits(source([1, 2, 3]), (8, 8, 1), 4)
    named = r"7 of 10 .* \(1, class 4, class 5, class 6, class 7, …\)\. Balanced draws leave them out"
    with pytest.warns(DataWarning, match=named):
        check_fits(source([0, 2, 3]), (8, 8, 1), 10)


def test_other_images_under_the_same_labels_are_told_apart(tmp_path):
    labels, contents = np.arange(4), []
    for name, value, save in (("a", 0, np.savez), ("copy", 0, np.savez_compressed), ("other", 1, np.savez)):
        path = tmp_path / f"{name}.npz"
        save(path, images=np.full((4, 2, 2, 1), value, np.uint8), labels=labels)
        contents.append(load_source("arrays", str(path), "train", max_examples=3, class_balance=True).contents)
    assert contents[0] == contents[1] != contents[2]
    assert load_source("digits", "", "train").contents != load_source("digits", "", "test").contents


def test_a_path_that_begins_at_home(tmp_path, monkeypatch):
    np.savez(tmp_path / "mine.npz", images=np.zeros((2, 4, 4, 1), np.uint8), labels=np.arange(2))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_source("arrays", "~/mine.npz", "train")) == 2


def test_nan_is_named(tmp_path):
    images = np.zeros((5, 4, 4, 1), np.float32)
    images[3, 1, 1] = np.nan
    np.savez(tmp_path / "nan.npz", images=images, labels=np.zeros(5, int))
    with pytest.raises(DataError, match="example 3 of the data holds NaN"):
        load_source("arrays", str(tmp_path / "nan.npz"), "train")


def test_unknown_names():
    with pytest.raises(DataError, match=r"'mnist': expected one of digits, fashion_mnist, arrays"):
        load_source("mnist", "", "train")
    with pytest.raises(DataError, match=r"split='validation': expected one of all, train, test"):
        load_source("digits", "", "validation")
    with pytest.raises(DataError, match="no such file"):
        load_source("arrays", "nowhere.npz", "train")


def test_data_that_does_not_fit_the_model():
    digits = load_source("digits", "", "all")
    check_fits(digits, (8, 8, 1), 10)
    with pytest.raises(DataError, match=r"set model.input_size=\(8, 8\) and model.in_channels=1"):
        check_fits(digits, (8, 8, 4), 10)
    with pytest.raises(DataError, match=r"set model\.num_classes=10"):
        check_fits(digits, (8, 8, 1), 9)
