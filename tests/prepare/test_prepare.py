"""`prepare` makes a store of images, continues an unfinished one, and refuses what does not belong to it."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpdit_jax.data.image_sets import _parse, open_images, open_set
from mpdit_jax.data.latent_store import LatentStore, read_manifest
from mpdit_jax.data.sources import load_source
from mpdit_jax.errors import DataError, DataWarning, InputError, MPDiTError
from mpdit_jax.prepare import store
from mpdit_jax.prepare.__main__ import main
from tests.prepare.conftest import arguments
from tests.tiny import free_port, start


@pytest.fixture(scope="module")
def finished(folder, vae_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "store"
    assert main(arguments(folder, vae_folder, out)) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def contents(out):
    """Return the bytes of every file but the lock, which says who held it last."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def test_the_store_holds_what_the_vae_says(finished, folder, vae_folder):
    from mpdit_jax.vae import load_vae

    opened = LatentStore(finished)
    manifest = opened.manifest
    assert manifest.class_names == ("one", "two", "zero")
    assert manifest.class_counts == (4, 4, 4)
    assert [shard.examples for shard in manifest.shards] == [5, 5, 2]
    records = opened.read(np.array([11, 0, 6]))
    assert records["label"].tolist() == [2, 0, 1]
    vae = load_vae(vae_folder)
    for record in records:
        image = np.asarray(Image.open(folder / record["key"].decode()), np.float32)[None, :, :, None] / 127.5 - 1
        for view, pixels in enumerate((image, image[:, :, ::-1])):
            mean, std = vae.encode(pixels)
            np.testing.assert_allclose(record["mean"][view], mean[0], rtol=2e-3, atol=2e-3)
            np.testing.assert_allclose(record["std"][view], std[0], rtol=2e-3, atol=2e-3)
    everything = opened.read(np.arange(12))
    mean, std = everything["mean"].astype(float), everything["std"].astype(float)
    np.testing.assert_allclose(manifest.latent_mean, mean.mean(axis=(0, 1, 2, 3)))
    np.testing.assert_allclose(
        np.square(manifest.latent_std), (std**2).mean(axis=(0, 1, 2, 3)) + mean.var(axis=(0, 1, 2, 3))
    )


def test_repeating_changes_nothing(copy, folder, vae_folder):
    before = contents(copy)
    assert main(arguments(folder, vae_folder, copy)) == 0
    assert contents(copy) == before


def test_an_interrupted_store_is_finished_with_the_same_bytes(finished, folder, vae_folder, tmp_path, monkeypatch):
    from mpdit_jax.prepare import shards

    out, write = tmp_path / "out", shards.atomic_write
    written = []

    def dies(path):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write(path)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "atomic_write", dies)
        with pytest.raises(KeyboardInterrupt):
            main(arguments(folder, vae_folder, out))
    (out / ".shard-00002-of-00003.array_record.tmp").write_bytes(b"half of it")
    kept = out / "shard-00000-of-00003.array_record"
    before = kept.stat().st_mtime_ns
    with pytest.raises(DataError, match=r"manifest.json is missing"):
        LatentStore(out)
    assert main(arguments(folder, vae_folder, out)) == 0
    assert kept.stat().st_mtime_ns == before
    assert contents(out) == contents(finished)


@pytest.mark.parametrize("status", [0, 75])
def test_a_stopped_store_ends_with_the_status_for_schedulers(status, folder, vae_folder, tmp_path, monkeypatch, capsys):
    from mpdit_jax.prepare import store

    monkeypatch.setenv("MPDIT_JAX_STOPPED_STATUS", str(status))
    monkeypatch.setattr(store, "_encode_all", lambda plan, out, stop: True)
    assert main(arguments(folder, vae_folder, tmp_path / "out")) == status
    assert "stopped; the same command continues" in capsys.readouterr().out


def test_a_finished_store_that_lost_files_is_repaired(finished, copy, folder, vae_folder, capsys):
    kept = copy / "shard-00000-of-00003.array_record"
    before = kept.stat().st_mtime_ns
    (copy / "shard-00001-of-00003.array_record").unlink()
    (copy / "shard-00002-of-00003.array_record").write_bytes(b"half")
    (copy / "labels.npy").unlink()
    assert main(arguments(folder, vae_folder, copy)) == 0
    assert f"repairing {copy}, since {copy}/shard-00001-of-00003.array_record is missing" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before
    assert contents(copy) == contents(finished)
    edit(copy, schema_version=2)
    with pytest.raises(DataError, match="schema version 2"):
        main(arguments(folder, vae_folder, copy))
    assert json.loads((copy / "manifest.json").read_text())["schema_version"] == 2


def test_other_settings_are_refused(copy, folder, vae_folder, other_vae):
    before = contents(copy)
    with pytest.raises(InputError, match=r"vae_fingerprint: .* there, .* now"):
        main(arguments(folder, other_vae, copy))
    with pytest.raises(InputError, match="image_size: 8 there, 16 now"):
        main(arguments(folder, vae_folder, copy, "--image_size=16"))
    assert contents(copy) == before


def test_other_class_names_are_another_setting(copy, folder, vae_folder, tmp_path):
    (tmp_path / "names.txt").write_text("one\nto\nzero\nmany\n")
    with pytest.raises(
        InputError, match=r"\(class_names\[1\]: two there, to now; class_names\[3\]: None there, many now\)"
    ):
        main(arguments(folder, vae_folder, copy, f"--class_names={tmp_path / 'names.txt'}"))


def test_an_image_of_another_size_is_another_set(folder, vae_folder, tmp_path):
    """A finished store would otherwise say that it is done although an image was replaced under its name."""
    root = shutil.copytree(folder, tmp_path / "images")
    assert main(arguments(root, vae_folder, tmp_path / "out")) == 0
    touched = next((root / "two").iterdir())
    os.utime(touched, (0, 0))  # copies on other machines have other times
    assert main(arguments(root, vae_folder, tmp_path / "out")) == 0
    Image.new("L", (16, 16), 9).save(touched)
    with pytest.raises(InputError, match=r"images: .* there, .* now"):
        main(arguments(root, vae_folder, tmp_path / "out"))


def test_processes_with_different_vaes_write_nothing(folder, vae_folder, other_vae, tmp_path):
    """The same path may lead to different VAEs on two machines."""
    port, out = free_port(), tmp_path / "out"
    processes = [
        start(
            "prepare",
            [
                *arguments(folder, vae, out),
                f"--coordinator_address=localhost:{port}",
                "--num_processes=2",
                f"--process_id={index}",
            ],
        )
        for index, vae in enumerate((vae_folder, other_vae))
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 1
        assert re.search(r"^error: process 1 was started with vae_fingerprint=\w+ instead of \w+, unlike", stderr, re.M)
        assert "Traceback" not in stderr
    assert not out.exists()


def test_a_broken_image_is_left_out_and_many_fail(folder, vae_folder, tmp_path, capsys):
    root = shutil.copytree(folder, tmp_path / "images")
    for index in range(110):
        shutil.copy(next((folder / "one").iterdir()), root / "one" / f"more{index}.png")
    (root / "two" / "broken.png").write_bytes(b"no image")
    odd = Image.new("RGB", (12, 9), (200, 30, 90))
    odd.convert("CMYK").save(root / "one" / "more0.jpg")
    Image.fromarray(np.full((9, 12), 40000, np.uint16)).save(root / "one" / "more1.png")
    odd.convert("P").save(root / "one" / "more2.gif")
    out = tmp_path / "out"
    assert main(arguments(root, vae_folder, out, "--shard_size=50")) == 0
    [rejected] = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert rejected["key"] == "two/broken.png"
    assert rejected["reason"].startswith("cannot identify a picture of the kinds JPEG, PNG")
    assert read_manifest(out).examples == 124
    assert "1 rejected" in capsys.readouterr().out
    odd.save(root / "two" / "moves.gif", save_all=True, append_images=[odd.rotate(90)])
    with pytest.raises(DataError, match="2 of 126 images were rejected, more than 1%"):
        main(arguments(root, vae_folder, tmp_path / "other", "--shard_size=50"))
    assert not (tmp_path / "other" / "manifest.json").exists()
    lines = (tmp_path / "other" / "rejected.jsonl").read_text().splitlines()
    reasons = {line["key"]: line["reason"] for line in map(json.loads, lines)}
    assert reasons.keys() == {"two/broken.png", "two/moves.gif"}
    assert "animated or of several pages: 2 frames" in reasons["two/moves.gif"]


@pytest.fixture
def broken(folder, tmp_path):
    """The folder with three more pictures that cannot be read, all after the first shard of five."""
    root = shutil.copytree(folder, tmp_path / "images")
    for name in ("two/z.png", "zero/000.png", "zero/001.png"):
        (root / name).write_bytes(b"no image")
    return root


def shards(out):
    return {path.name: path.stat().st_mtime_ns for path in sorted(out.glob("shard-*"))}


@pytest.mark.slow
@pytest.mark.parametrize("repaired", [False, True])
def test_a_refused_store_continues_without_the_removed_images(broken, vae_folder, tmp_path, repaired):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"3 of 15 images were rejected.*two/z\.png: cannot.*remove or repair them"):
        main(arguments(broken, vae_folder, out))
    before = shards(out)
    for name in ("two/z.png", "zero/000.png", "zero/001.png"):
        (broken / name).unlink()
    if repaired:
        Image.new("L", (8, 8), 9).save(broken / "two/z.png")
    assert main(arguments(broken, vae_folder, out)) == 0
    after = shards(out)
    assert [name[:11] for name in before | after if before[name] != after[name]] == ["shard-00001"] * repaired
    manifest, written = read_manifest(out), contents(out)
    assert (manifest.examples, manifest.rejected) == (12 + repaired, 0)
    assert (out / "rejected.jsonl").read_text() == ""
    assert main(["--verify", f"--out={out}"]) == 0
    assert main(arguments(broken, vae_folder, out)) == 0
    assert contents(out) == written
    (broken / "one/more.png").write_bytes((broken / "one" / os.listdir(broken / "one")[0]).read_bytes())
    with pytest.raises(InputError, match="number of images: 15 there, 16 now"):
        main(arguments(broken, vae_folder, out))


def test_too_many_broken_images_are_refused_early(broken, vae_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_JUDGED_EARLY", 0)
    for _ in range(2):  # the second start need not encode anything to say the same
        with pytest.raises(DataError, match="1 of 15 images were rejected"):
            main(arguments(broken, vae_folder, tmp_path / "out"))
        assert list(shards(tmp_path / "out")) == ["shard-00000-of-00003.array_record"]


def test_verify(copy, capsys):
    assert main(["--verify", f"--out={copy}"]) == 0
    stated = json.loads((copy / "manifest.json").read_text())["latent_mean"]
    for fields, message in (
        ({"latent_mean": [stated[0] + 0.01, stated[1]]}, "states latent means"),
        ({"rejected": 1}, "rejected.jsonl does not name 1 images"),
    ):
        manifest = (copy / "manifest.json").read_bytes()
        edit(copy, **fields)
        with pytest.raises(DataError, match=message):
            main(["--verify", f"--out={copy}"])
        (copy / "manifest.json").write_bytes(manifest)
    shard = copy / "shard-00001-of-00003.array_record"
    damaged = bytearray(shard.read_bytes())
    damaged[-70] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(DataError, match=r"shard-00001-of-00003.array_record is not what was written"):
        main(["--verify", f"--out={copy}"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "shard-00000-of-00003.array_record").unlink(), "shard-00000.* is missing"),
        (lambda out: (out / "shard-00000-of-00003.array_record").write_bytes(b"half"), "4 bytes instead of"),
        (lambda out: edit(out, schema_version=2), "schema version 2 .* reads version 1"),
        (lambda out: edit(out, class_counts=[4, 4, 5]), "contradicts itself"),
        (lambda out: edit(out, unknown=1), "is damaged"),
        (lambda out: (out / "manifest.json").write_text("{"), "is damaged"),
        (lambda out: np.save(out / "labels.npy", np.full(12, 3, np.int32)), "label 3 is outside 0 to 2"),
        (lambda out: (out / "labels.npy").unlink(), "labels.npy cannot be read"),
    ],
)
def test_a_damaged_store_is_refused_when_it_is_opened(copy, damage, message):
    damage(copy)
    with pytest.raises(DataError, match=message):
        load_source("latents", str(copy), "train", normalization="manifest")


def edit(out, **fields):
    stored = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(stored | fields))


def test_the_papers_constants_are_for_four_channels(finished):
    with pytest.raises(MPDiTError, match="have 2: set it to 'manifest'"):
        load_source("latents", str(finished), "train", normalization="paper")


def test_zero_images_and_unknown_places(tmp_path, vae_folder):
    for images, message in (
        (tmp_path / "nowhere", "no such file or folder; expected a FOLDER of images, a FILE.npz, idx:FOLDER"),
        (tmp_path, "no images in subfolders"),
        (f"idx:{tmp_path}", "train-images-idx3-ubyte"),
    ):
        with pytest.raises(DataError, match=message):
            main(arguments(images, vae_folder, tmp_path / "out"))


def test_an_idx_file_without_images(tmp_path, vae_folder):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + np.array([0, 8, 8], ">u4").tobytes())
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + np.array([0], ">u4").tobytes())
    with pytest.raises(DataError, match="there are no images"):
        main(arguments(f"idx:{tmp_path}", vae_folder, tmp_path / "out"))


@pytest.mark.parametrize("form", ["npz", "idx", "data"])
def test_other_forms_of_labelled_images(form, vae_folder, tmp_path):
    from sklearn import datasets

    digits = datasets.load_digits()
    pixels = (digits.images[:8] * 255 / 16).round().astype(np.uint8)
    np.savez(tmp_path / "digits.npz", images=pixels[..., None], labels=digits.target[:8])
    for part, array in (("images-idx3", pixels), ("labels-idx1", digits.target[:8].astype(np.uint8))):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (tmp_path / f"some-{part}-ubyte").write_bytes(header + array.tobytes())
    place = {"npz": f"{tmp_path}/digits.npz", "idx": f"idx:{tmp_path}:some", "data": "data:digits:all"}[form]
    images = open_images(place)
    assert [images.decode(index)[1] for index in range(8)] == list(range(8))
    grey = dataclasses.replace(images, channels=1)
    np.testing.assert_array_equal([grey.decode(index)[0][..., 0] for index in range(8)], pixels)
    np.testing.assert_array_equal(open_set(place, channels=1).read(np.arange(8))[..., 0], pixels)
    assert images.class_names == tuple("0123456789"[: 10 if form == "data" else 8])
    if form == "npz":
        assert main(arguments(place, vae_folder, tmp_path / "out")) == 0
        assert read_manifest(tmp_path / "out").class_counts == (1,) * 8


def test_what_is_no_set_of_images_is_refused_by_name(finished, folder, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "odd.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8), labels=np.array([0, 2**40]))
    np.savez(tmp_path / "first.npz", arr_0=np.zeros((2, 1, 8, 8), np.uint8))
    forms = r"a FOLDER of images, a FILE\.npz, idx:FOLDER\[:SPLIT\], tfds:NAME\[:SPLIT\] or data:NAME\[:SPLIT\]"
    for place, message in (
        (finished, f"is a store of latents: give the images it was made of, {forms}"),
        ("idy:/mnist", f"idy:/mnist: no such file or folder; expected {forms}"),
        (tmp_path / "samples.npz", "no labels; expected an array `labels`"),
        (tmp_path / "odd.npz", "label 1099511627776 is too large"),
        (tmp_path / "first.npz", r"channels are first, give arr_0\.transpose\(0, 2, 3, 1\)"),
        ("data:arrays", r"expected data:NAME\[:SPLIT\] with a name of digits, fashion_mnist"),
    ):
        with pytest.raises(MPDiTError, match=message):
            open_images(str(place))
    with pytest.raises(DataError, match=f"no such file or folder; expected {forms}"):
        open_set("idy:/mnist")
    assert _parse("tfds:imagenet2012:5.1.0") == ("tfds", "imagenet2012:5.1.0", "train")
    assert _parse("tfds:imagenet2012:5.1.0:validation[:10%]", "train")[1:] == ("imagenet2012:5.1.0", "validation[:10%]")


def test_an_empty_class_is_named(folder, vae_folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    (root / "nothing").mkdir()
    with pytest.warns(DataWarning, match=r"1 of 4 classes have no examples and are not trained \(nothing\)"):
        main(arguments(root, vae_folder, tmp_path / "out"))


def test_other_pixels_under_the_same_names_are_another_set(tmp_path, vae_folder):
    for value in (0, 1):
        pixels = np.full((4, 8, 8), value, np.uint8)
        header = bytes([0, 0, 8, 3]) + np.array(pixels.shape, ">u4").tobytes()
        (tmp_path / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes([0, 0, 8, 1]) + np.array([4], ">u4").tobytes() + bytes(range(4))
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
        if value == 0:
            assert main(arguments(f"idx:{tmp_path}", vae_folder, tmp_path / "out")) == 0
        else:
            with pytest.raises(InputError, match=r"images: .* there, .* now"):
                main(arguments(f"idx:{tmp_path}", vae_folder, tmp_path / "out"))


def test_a_name_that_is_not_utf8(folder, vae_folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    name = b"caf\xe9.png"
    try:
        Path(os.fsdecode(os.fsencode(root / "one") + b"/" + name)).write_bytes(
            next((root / "two").iterdir()).read_bytes()
        )
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert main(arguments(root, vae_folder, tmp_path / "out")) == 0
    opened = LatentStore(tmp_path / "out")
    assert b"one/" + name in opened.read(np.arange(len(opened)))["key"].tolist()


def test_the_vaes_own_factors(finished, vae_folder):
    config = json.loads((vae_folder / "config.json").read_text())
    space = load_source("latents", str(finished), "train", normalization="vae").latents
    assert space.std == (1 / config["scaling_factor"],) * 2
    assert space.mean == (config.get("shift_factor") or 0.0,) * 2


def test_without_a_vae_the_store_holds_pixels(folder, vae_folder, tmp_path):
    from mpdit_jax.data.info import record_dataset
    from mpdit_jax.sample.decoding import make_decode

    out, workdir = tmp_path / "pixels", tmp_path / "run"
    assert main(arguments(folder, "none", out)) == 0
    assert main(["--verify", f"--out={out}"]) == 0
    source = load_source("latents", str(out), "train", normalization="manifest")
    assert source.shape == (8, 8, 3)
    assert source.latents.vae_fingerprint == "pixels"
    [record] = LatentStore(out).read(np.array([7]))
    with Image.open(folder / record["key"].decode()) as file:
        pixels = np.asarray(file.convert("RGB"))
    for view, expected in zip(record["mean"].astype(np.float32), (pixels, pixels[:, ::-1]), strict=True):
        np.testing.assert_array_equal(np.rint((view + 1) * 127.5), expected)  # float16 loses nothing of 8 bits
    assert (record["std"] == 0).all()
    workdir.mkdir()
    record_dataset(workdir, source, trained=False)
    normalized = (record["mean"][:1].astype(np.float32) - source.latents.mean) / source.latents.std
    for vae in (None, "", "none"):
        decoded = np.asarray(make_decode(workdir, vae)(normalized.astype(np.float32)))
        np.testing.assert_array_equal(np.rint((decoded[0] + 1) * 127.5), pixels)
    with pytest.raises(InputError, match="is a run on pixels, which needs no VAE: leave it out"):
        make_decode(workdir, str(vae_folder))


def test_tiles_are_another_setting(copy, folder, vae_folder, tmp_path):
    with pytest.raises(InputError, match="vae_tile: 0 there, 32 now"):
        main(arguments(folder, vae_folder, copy, "--vae_tile=32"))
    with pytest.raises(InputError, match="--vae_tile=100: expected a multiple of 32"):
        main(arguments(folder, vae_folder, tmp_path / "out", "--vae_tile=100"))


def test_sizes_that_do_not_fit_the_vae(folder, vae_folder, tmp_path):
    with pytest.raises(InputError, match="--image_size=100000: expected 1 to 4096 pixels"):
        main(arguments(folder, vae_folder, tmp_path / "out", "--image_size=100000"))
    with pytest.raises(InputError, match="--image_size=9: expected a multiple of the VAE's downsample factor 2"):
        main(arguments(folder, vae_folder, tmp_path / "out", "--image_size=9"))


def test_max_examples_and_class_balance(finished):
    few = load_source("latents", str(finished), "train", normalization="manifest", max_examples=3)
    assert few.labels.tolist() == [0, 1, 2]
    assert few.batch(np.array([2]))["y"].tolist() == [2]
    uneven = load_source(
        "latents", str(finished), "train", normalization="manifest", max_examples=5, class_balance=True
    )
    assert np.bincount(uneven.labels).tolist() == [2, 2, 2]


def test_class_balance_repeats_each_example_equally_often_or_once_more():
    from mpdit_jax.data.sources import array_source, balanced

    labels = np.repeat([0, 1], [10, 7])
    even = balanced(array_source(np.zeros((17, 1, 1, 1), np.uint8), labels, ("a", "b")))
    assert np.bincount(even.labels).tolist() == [10, 10]
    visits = np.bincount(even.rows, minlength=17)
    assert visits[:10].tolist() == [1] * 10
    assert sorted(visits[10:]) == [1, 1, 1, 1, 2, 2, 2]
    assert visits[10:13].sum() < 6  # not the first three
