"""Every command reads the same pictures of a folder and counts the files that it leaves out."""

import re
import warnings

import numpy as np
import pytest
from PIL import Image, features

from mpdit_jax.data.image_sets import open_images, open_set
from mpdit_jax.data.picture_files import find_pictures
from mpdit_jax.errors import DataError, DataWarning
from tests.tiny import run

PICTURES = ["cat/0.png", "cat/deep/er/1.jfif", "dog/2.JPG", "dog/3.gif"]
LEFT_OUT = [
    "._0.jpg", "cat/.hidden.png", "cat/deep/.ipynb_checkpoints/0-checkpoint.png", "cat/deep/._1.jfif",
    "dog/Thumbs.db", "__MACOSX/cat/._0.png", "dog/__MACOSX/2.png", ".git/4.png",
]  # fmt: skip


def write(root, names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"jfif": "JPEG", "JPG": "JPEG"}.get(path.suffix[1:], path.suffix[1:].upper())
        Image.new("RGB", (8, 8), (40 * number, 0, 90)).save(path, kind if kind in ("JPEG", "AVIF") else "PNG")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    write(root, PICTURES)
    return root


@pytest.fixture
def littered(folder):
    write(folder, LEFT_OUT)
    for name in ("labels.txt", "cat/notes.TXT", "cat/deep/raw.heic", "dog/README"):
        (folder / name).write_text("not a picture")
    return folder


def test_what_is_left_out_is_counted_at_every_depth(littered):
    with pytest.warns(DataWarning) as caught:
        assert find_pictures(littered) == PICTURES
    (said,) = [str(one.message) for one in caught]
    # Files inside a folder that is left out are not counted: .git, .ipynb_checkpoints and each __MACOSX count as one.
    assert said.startswith(f"{littered}: 8 hidden files, folders or leftovers are left out (")
    assert said.endswith(" and 4 files are of kinds that are not read (2 .txt, 1 .heic, 1 without an ending).")


@pytest.mark.filterwarnings("ignore::mpdit_jax.errors.DataWarning")
def test_every_command_reads_the_same_pictures(littered):
    labelled, anywhere, evaluated = (
        open_images(str(littered)), open_images(str(littered), classes=False), open_set(str(littered))
    )  # fmt: skip
    assert list(labelled.keys) == list(anywhere.keys) == list(evaluated.keys) == PICTURES
    assert labelled.class_names == ("cat", "dog")
    assert labelled.labels.tolist() == [0, 0, 1, 1]
    everything = evaluated.read(np.arange(4))
    np.testing.assert_array_equal(anywhere.read(np.arange(4)), everything)
    np.testing.assert_array_equal([labelled.decode(index)[0] for index in range(4)], everything)
    np.testing.assert_array_equal(anywhere.batch(np.arange(4))["x"], everything.astype(np.float32) / 127.5 - 1)


def test_litter_makes_no_other_set(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = open_images(str(folder)).identity, open_set(str(folder)).about
    write(folder, LEFT_OUT)
    with pytest.warns(DataWarning):
        assert (open_images(str(folder)).identity, open_set(str(folder)).about) == before


def test_avif_is_read_where_pillow_reads_it(folder):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    write(folder, ["dog/4.avif"])
    assert open_set(str(folder)).read(np.arange(5)).shape == (5, 8, 8, 3)


def test_a_folder_without_classes_says_how_to_make_one(tmp_path, folder):
    """A folder without subfolders has no labels; commands that need none read it."""
    flat = tmp_path / "flat"
    write(flat, ["0.png", "1.png"])
    expected = f"{flat}: 2 images, and no images in subfolders; expected {flat}/CLASS/IMAGE, where one subfolder makes"
    with pytest.raises(DataError, match=re.escape(expected)):
        open_images(str(flat))
    arguments = [f"--images={flat}", "--vae=none", "--image_size=8", f"--out={tmp_path / 'out'}"]
    (flat / ".hidden.png").touch()
    status, _, stderr = run("prepare", arguments)
    assert status == 1
    assert stderr.splitlines() == [
        f"warning: {flat}: 1 hidden files, folders or leftovers are left out (.hidden.png).",
        next(line for line in stderr.splitlines() if line.startswith(f"error: {expected} one class")),
    ]
    (flat / ".hidden.png").unlink()
    assert len(open_images(str(flat), classes=False)) == len(open_set(str(flat))) == 2
    write(folder, ["beside.png"])
    with pytest.warns(DataWarning, match="1 images lie in no subfolder and are left out"):
        assert len(open_images(str(folder))) == 4


def test_pictures_of_several_sizes_are_no_set_unless_they_are_cut(folder):
    Image.new("RGB", (9, 8)).save(folder / "dog/2.JPG")
    with pytest.raises(DataError, match=r"dog/2\.JPG is \(8, 9\) and cat/0\.png is \(8, 8\) .*--image_size=PIXELS"):
        open_set(str(folder)).read(np.arange(4))
    assert open_set(str(folder), image_size=4).read(np.arange(4)).shape == (4, 4, 4, 3)
