"""Image sets are read whole or in part, and their `about` tells one from another."""

import io
import os
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mpdit_jax.data.image_sets import ArrayImages, open_npz, open_set
from mpdit_jax.errors import DataError, InputError
from mpdit_jax.evaluate import compute
from mpdit_jax.evaluate.__main__ import _place
from mpdit_jax.evaluate.compute import compute_statistics
from mpdit_jax.evaluate.extractors import _build
from mpdit_jax.evaluate.moments import Moments
from mpdit_jax.evaluate.shared_values import portable
from mpdit_jax.evaluate.subsets import random_subset
from tests.evaluate.conftest import _Means, collect


@pytest.fixture
def folder(tmp_path):
    """The first file is grey; the others have colours, and one lies in a subfolder."""
    random, root = np.random.default_rng(0), tmp_path / "images"
    (root / "b").mkdir(parents=True)
    Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(root / "a.png")
    for name in ("b/c.png", "d.png"):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name)
    return root


def test_a_folder_whose_first_file_is_grey_keeps_its_colours(folder, extractor, tiny_inception):
    found = open_set(str(folder), channels=tiny_inception.channels).read(np.arange(3))
    expected = [np.asarray(Image.open(folder / name).convert("RGB")) for name in ("a.png", "b/c.png", "d.png")]
    np.testing.assert_array_equal(found, expected)
    assert open_set(str(folder), channels=extractor.channels).shape == (8, 8, 1)  # its classifier is of grey images


def test_another_file_in_a_subfolder_makes_another_set(folder):
    file, before = folder / "b/c.png", open_set(str(folder)).about
    known = file.stat()
    assert open_set(str(folder)).about == before
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns + 1))
    assert open_set(str(folder)).about != before


def test_a_copy_elsewhere_is_the_same_set_to_several_processes(folder, tmp_path):
    """Places and times of change differ between copies; only a single process compares them."""
    copy = shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copy)
    first, second = open_set(str(folder)).about, open_set(str(copy)).about
    assert first["files"] != second["files"]
    assert portable(first) == portable(second)
    some = [random_subset(open_set(str(root)), 2).about for root in (folder, copy)]
    assert portable(some[0]) == portable(some[1]) != portable(first)
    (copy / "b/c.png").rename(copy / "c.png")
    assert portable(open_set(str(copy)).about) != portable(first)
    (copy / "c.png").unlink()
    assert portable(open_set(str(copy)).about) != portable(first)
    assert portable({"data": {"name": "arrays", "path": "/here"}, "path": "/here"}) == {"data": {"name": "arrays"}}


def test_arrays_of_one_size_are_told_apart_by_their_checksums(tmp_path):
    numbers = []
    for name, value in (("first", 0), ("copy", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "set.npz", arr_0=np.full((4, 2, 2, 1), value, np.uint8))
        numbers.append(portable(open_npz(tmp_path / name / "set.npz").about))
    assert numbers[0] == numbers[1] != numbers[2]
    assert numbers[0]["bytes"] == numbers[2]["bytes"]
    assert portable(open_set("data:digits:test").about) != portable(open_set("data:digits:train").about)


@pytest.mark.parametrize("order", ["sorted", "round"])
def test_some_images_are_of_all_classes(tmp_path, order):
    labels = np.sort(np.arange(1000) % 10) if order == "sorted" else np.arange(1000) % 10
    images = np.zeros((1000, 2, 2, 1), np.uint8) + labels[:, None, None, None].astype(np.uint8)
    np.savez(tmp_path / "set.npz", arr_0=images, labels=labels)
    some = random_subset(open_npz(tmp_path / "set.npz"), 100)
    seen = some.read(np.arange(100))[:, 0, 0, 0]
    assert set(seen) == set(range(10))
    assert np.bincount(seen).max() < 25
    counts = np.bincount(seen)
    assert some.about["labels"] == {"classes": 10, "fewest": counts.min(), "most": counts.max()}
    assert (some.about["count"], some.about["of"]) == (100, 1000)
    assert some.about["chosen"] == "one at random of each of 100 parts"


def test_only_what_metrics_need_is_kept_and_each_process_sums_its_share(tmp_path, monkeypatch, extractor, digits):
    images = ArrayImages(digits[0][:300], {"path": "digits"})
    look = partial(compute_statistics, extractor, images, ["pool"], batch_size=64, block_size=100, scratch=tmp_path)
    for name in ("barrier", "assert_equal_across_processes"):
        monkeypatch.setattr(compute, name, lambda what: None)
    monkeypatch.setattr(compute, "name_from_process_0", lambda name: name)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    monkeypatch.setattr(compute, "merge_processes", lambda moments: shares.append(moments) or moments)
    for index in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        look([], "features")
    assert [share.count for share in shares] == [100, 200]
    whole = Moments.of(extractor(images.images)["pool"])
    np.testing.assert_allclose(shares[0].merge(shares[1]).covariance, whole.covariance, rtol=1e-9, atol=1e-12)
    assert look([], "features").features is None
    gathered = {}
    monkeypatch.setattr(
        compute, "gather_rows", lambda rows, order: gathered.update(zip(order, rows, strict=True)) or rows
    )
    for index in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        look(["pool"], "features")
    kept = np.stack([gathered[row] for row in range(300)])
    np.testing.assert_array_equal(kept, collect(extractor, [extractor(images.images)], {}).features)


@pytest.mark.parametrize(("samples", "place"), [
    ("data:digits:test", "data_digits_test"), ("idx:/mnist:test", "idx_mnist_test"), ("some/photos/", "some/photos"),
])  # fmt: skip
def test_numbers_go_beside_a_set_that_has_a_place_and_else_here(samples, place):
    assert _place(Namespace(out="", workdir="", samples=samples)) == Path(f"{place}.metrics.json")


def test_an_image_without_features_is_named_by_its_place_in_the_set():
    pool = lambda model, images: {"pool": 1 / images.astype(jax.numpy.float32).mean((1, 2))}  # noqa: E731
    inverse = _build("inverse", _Means(), pool, {"pool": 1}, {}, 8)
    images = np.ones((50, 2, 2, 1), np.uint8)
    images[37] = 0
    with pytest.raises(InputError, match="the features of image 37 hold NaN or Inf"):
        compute_statistics(inverse, ArrayImages(images, {}), ["pool"], [], "features", batch_size=20)


def test_a_damaged_picture_is_named_whatever_its_decoder_raises(tmp_path):
    """Every byte of a TIFF is damaged in turn; some make Pillow raise a TypeError."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(108, dtype=np.uint8).reshape(12, 9)).save(buffer, "TIFF")
    path, refused = tmp_path / "a.tiff", 0
    for place in range(len(buffer.getvalue()) - 108):
        content = bytearray(buffer.getvalue())
        content[place] ^= 1
        path.write_bytes(content)
        try:
            open_set(str(tmp_path))
        except DataError:
            refused += 1
    assert refused > 10
