"""Damaged and malicious files, in bulk, are read or refused by our own errors, and cannot make us allocate memory."""

import dataclasses
import gzip
import io
import json
import shutil
import struct
import zipfile
import zlib
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mpdit_jax as mp
from mpdit_jax.checkpoint.load import load_config
from mpdit_jax.checkpoint.reader import is_complete
from mpdit_jax.data.crop import to_mode, to_square
from mpdit_jax.data.info import read_dataset_info
from mpdit_jax.data.latent_store import LatentStore
from mpdit_jax.data.picture_sets import open_folder
from mpdit_jax.data.sources import load_arrays
from mpdit_jax.errors import CheckpointError, DataError, InputError, MPDiTError, WeightsError
from mpdit_jax.io.idx import read_idx
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.io.locked_folder import LockedFolder
from mpdit_jax.prepare.shards import _read
from mpdit_jax.prepare.store import JOB
from mpdit_jax.sample.blocks import Block, BlockFolder
from mpdit_jax.train.__main__ import main
from tests.data.test_latents import make_store
from tests.faults.damage import DAMAGE, MUTATIONS, bulk, damaged, json_survives, survives
from tests.tiny import train_arguments


def test_npz(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, images=np.zeros((4, 8, 8, 1), np.uint8), labels=np.arange(4))
    survives(path, path.read_bytes(), lambda path: load_arrays(str(path)), DataError)
    np.savez_compressed(path, images=np.zeros((4, 8, 8, 1), np.float32), labels=np.arange(4))
    survives(path, path.read_bytes(), lambda path: load_arrays(str(path)), DataError)


@pytest.mark.parametrize("header", [
    "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 1000, 1), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 1), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (4, 8, 8, 1), }",
    "{'descr': '|V9999999999', 'fortran_order': False, 'shape': (4, 8, 8, 1), }",
    "{'descr': '|u1', 'shape': (4, 8, 8, 1), }",
    "__import__('os').system('true')",
    "(" * 5000,
])  # fmt: skip
def test_npz_headers(tmp_path, header):
    """Nothing of the size that a header claims is allocated before the file is known to hold as much."""
    path = tmp_path / "mine.npz"
    np.savez(path, labels=np.arange(4))
    text = header.encode("latin1") + b"\n"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + bytes(256))
    with pytest.raises(DataError, match=r"expected an \.npz with arrays"):
        load_arrays(str(path))


def test_npz_bomb(tmp_path, monkeypatch):
    """A thousand-fold compressed array that the machine's memory does not hold is refused before it is unpacked."""
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, images=np.zeros((2**15, 32, 32, 1), np.uint8), labels=np.zeros(2**15, np.int64))
    assert path.stat().st_size < 2**16
    monkeypatch.setattr("mpdit_jax.io.npz._memory", lambda: 2**24)
    with pytest.raises(DataError, match="do not fit into this machine's memory"):
        load_arrays(str(path))


def test_unfinished_samples(tmp_path):
    folder = BlockFolder(tmp_path / "blocks", {"seed": 0})
    numbers = np.arange(2)
    folder.write(0, Block(np.zeros((2, 8, 8, 1), np.uint8), numbers, numbers, np.ones(2, bool)))
    path = tmp_path / "blocks" / "00000000.npz"
    survives(path, path.read_bytes(), lambda path: folder.read(0), InputError)
    folder.close()
    path = tmp_path / "blocks" / "settings.json"
    survives(path, path.read_bytes(), lambda path: BlockFolder(tmp_path / "blocks", {"seed": 0}).close(), InputError)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
def test_idx(tmp_path, name):
    content = b"\0\0\x08\x03" + struct.pack(">3I", 5, 8, 8) + bytes(5 * 64)
    content = gzip.compress(content) if name.endswith(".gz") else content
    survives(tmp_path / name, content, read_idx, DataError)


def test_idx_bomb(tmp_path):
    """A header that promises 4 GiB and a gzip file that unpacks to more than its header says are refused."""
    (tmp_path / "a").write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", 2**16, 2**8, 2**8))
    with pytest.raises(DataError, match="more than"):
        read_idx(tmp_path / "a")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 8) + bytes(2**24)))
    with pytest.raises(DataError, match="holds more"):
        read_idx(tmp_path / "b.gz")


def picture(kind, size=(12, 9)):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_pictures(tmp_path, kind):
    """`prepare` uses a damaged picture, or rejects it with a reason and goes on."""
    path = tmp_path / "class" / f"a.{kind.lower()}"
    path.parent.mkdir()

    def read(path):
        images, rejected = dataclasses.replace(open_folder(tmp_path, classes=True), image_size=8), []
        plan = Namespace(images=images, batch_size=1, class_names=("class",))
        with ThreadPoolExecutor(1) as pool:
            list(_read(range(1), plan, pool, rejected))
        if rejected:
            raise DataError(rejected[0][1])

    survives(path, picture(kind), read, DataError, count=MUTATIONS // 20)


def test_a_picture_of_more_pixels_than_a_photograph_has():
    """The picture is undamaged, and Pillow would only warn of it."""
    content = io.BytesIO()
    Image.new("1", (13_000, 11_000)).save(content, "PNG")
    assert len(content.getvalue()) < 50_000
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(InputError, match="13000 x 11000 pixels"),
    ):
        to_mode(Image.open(content), 1)


@pytest.mark.parametrize("size", [(60000, 60000), (16000, 9000), (1, 5000), (0, 4)])
def test_picture_bombs(size):
    """A few hundred bytes of PNG are refused if they unpack to gigabytes, or would be scaled to that size."""
    header = struct.pack(">IIBBBBB", size[1], size[0], 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = zlib.compress(bytes(2**16))
    content += struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    with pytest.raises((InputError, Image.DecompressionBombError, OSError, SyntaxError)) as caught:
        to_square(Image.open(io.BytesIO(content)), 256, 3)
    assert not isinstance(caught.value, MemoryError)
    with pytest.raises((InputError, Image.DecompressionBombError, OSError, SyntaxError)):
        to_mode(Image.open(io.BytesIO(content)), 3)  # the picture is refused without cropping too


TENSORS = {"x_embedder.proj.weight": np.zeros((8, 4, 2, 2), np.float32), "pos_embed": np.zeros((1, 4, 8), np.float32)}


def test_safetensors(tmp_path):
    content = safetensors.numpy.save(TENSORS)
    path = tmp_path / "weights.safetensors"
    read = lambda path: mp.load_torch(path, num_heads=2)  # noqa: E731
    outcome = 0

    @bulk(MUTATIONS // 8)
    @given(DAMAGE)
    def one(damage):
        nonlocal outcome
        path.write_bytes(damaged(content, damage))
        with pytest.raises(WeightsError):
            read(path)
        outcome += 1

    one()
    huge = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
    for text in (huge, b"{}", b"[]", b"{" * 1000):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(WeightsError):
            read(path)
    print(f"safetensors: {outcome} refused")


@pytest.mark.parity
def test_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pt"
    torch.save({name: torch.tensor(array) for name, array in TENSORS.items()}, path)
    content = path.read_bytes()

    @bulk(MUTATIONS // 12)
    @given(DAMAGE)
    def one(damage):
        path.write_bytes(damaged(content, damage))
        with pytest.raises(WeightsError):
            mp.load_torch(path, num_heads=2)

    one()


def test_state_dicts(golden):
    """State dicts with missing, extra, misshapen or wrongly typed entries are loaded, or refused by our own errors."""
    state = golden.group("parameters/") or golden.group("state/") or golden.group("weights/")
    assert state, sorted(golden.arrays)[:5]
    names = sorted(state)
    replacement = st.sampled_from([
        np.zeros(()), np.zeros((0, 3)), np.zeros((3, 5, 7)), np.array(["x"]), np.array([None]), "text", None,
        3, object(), np.zeros((2,) * 9), np.full((4, 4), np.nan),
    ])  # fmt: skip
    change = st.tuples(st.sampled_from([*names, "extra", "blocks.99.attn.qkv.weight", "", 3]), replacement)
    loaded = refused = 0

    @bulk(MUTATIONS // 12)
    @given(st.lists(change, max_size=3), st.sets(st.sampled_from(names), max_size=3))
    def one(changes, missing):
        nonlocal loaded, refused
        changed = {**{name: array for name, array in state.items() if name not in missing}, **dict(changes)}
        try:
            mp.load_torch(changed, num_heads=2)
            loaded += 1
        except MPDiTError as error:
            refused += bool(str(error))

    one()
    print(f"state dicts: {loaded} loaded, {refused} refused")
    assert refused
    assert loaded + refused >= MUTATIONS // 12


def test_manifests(tmp_path):
    folder = make_store(tmp_path / "store")
    json_survives(folder / "manifest.json", lambda: LatentStore(folder), DataError)
    path = folder / "labels.npy"
    survives(path, path.read_bytes(), lambda path: LatentStore(folder), DataError)


@pytest.mark.slow
def test_files_of_a_workdir(finished, tmp_path):
    """A damaged config.json or data.json is read, or refused by a CheckpointError."""
    for name in ("config.json", "data.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    json_survives(tmp_path / "config.json", lambda: load_config(tmp_path), CheckpointError)
    json_survives(tmp_path / "data.json", lambda: read_dataset_info(tmp_path), CheckpointError)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5])
def test_brackets_without_end(finished, tmp_path, text):
    """Deeply nested JSON is refused, although Python's parser fails on it with a RecursionError."""
    with pytest.raises(ValueError, match="too many levels of brackets"):
        parse_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_config(tmp_path)
    folder = shutil.copytree(finished, tmp_path / "run") / "checkpoints" / "8"
    (folder / "_CHECKPOINT_METADATA").write_text(text)
    assert not is_complete(folder)


def test_settings_of_prepare(tmp_path):
    settings = {"source": "x", "image_size": 8}
    (tmp_path / "prepare.json").write_text(json.dumps(settings))
    json_survives(tmp_path / "prepare.json", lambda: LockedFolder(tmp_path, JOB, settings).close(), InputError)


def test_a_config_of_an_older_version(finished, tmp_path):
    """Fields that the stored config lacks get their defaults; an unknown field is refused by name."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    stored = json.loads((finished / "config.json").read_text())
    del stored["checkpoint"]["grace"], stored["guard"], stored["profile"]
    (copy / "config.json").write_text(json.dumps(stored))
    assert load_config(copy) == load_config(finished)
    mp.load_checkpoint(copy)
    assert main(train_arguments(copy)) == 0
    (copy / "config.json").write_text(json.dumps({**stored, "warp": 9}))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: unknown config key config\.warp"):
        mp.load_checkpoint(copy)
