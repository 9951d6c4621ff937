"""No file that somebody else has made can run code, or write outside the folder that is meant for it."""

import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
from PIL import UnidentifiedImageError

import mpdit_jax as mp
from mpdit_jax.data.image_sets import open_images, open_set
from mpdit_jax.data.latent_store import LatentStore, read_manifest
from mpdit_jax.data.sources import load_arrays
from mpdit_jax.errors import ConfigError, DataError, MPDiTError, WeightsError
from mpdit_jax.interop.files import read_state_dict
from mpdit_jax.train.__main__ import main
from tests.tiny import ROOT


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def trace(tmp_path):
    """A file that must not be there at the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code ran"


@pytest.mark.parity
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("how", ["plain", "torch", "inside"])
def test_malicious_torch_files(tmp_path, trace, suffix, how):
    torch = pytest.importorskip("torch")
    path = tmp_path / f"weights{suffix}"
    if how == "plain":
        path.write_bytes(pickle.dumps(Bomb(trace)))
    else:
        torch.save(Bomb(trace) if how == "torch" else {"x_embedder.proj.weight": Bomb(trace)}, path)
    with pytest.raises(WeightsError, match=r"holds more than tensors|not a readable PyTorch file"):
        read_state_dict(path)
    with pytest.raises(WeightsError):
        mp.load_torch(path)


def test_pickle_under_another_name(tmp_path, trace):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(WeightsError, match=r"not a readable safetensors file"):
        read_state_dict(path)
    path = path.rename(tmp_path / "weights.pkl")
    with pytest.raises(WeightsError, match=r"unknown type"):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["images", "labels"])
def test_objects_in_npz(tmp_path, trace, name):
    arrays = {"images": np.zeros((2, 8, 8, 1), np.uint8), "labels": np.zeros(2, np.int64)}
    arrays[name] = np.array([Bomb(trace)], object)
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(DataError, match=r"expected an .npz with arrays"):
        load_arrays(str(tmp_path / "mine.npz"))
    (tmp_path / "pickled.npz").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(DataError, match=r"expected an .npz with arrays"):
        load_arrays(str(tmp_path / "pickled.npz"))


def test_no_code_of_ours_unpickles_or_evaluates():
    """Only `config.flags` runs a file, the --config of the command line."""
    forbidden = re.compile(
        r"\bpickle\.loads?\(|(?<![.\w])(eval|exec)\(|allow_pickle=True|weights_only=False|\bos\.system\(|shell=True|"
        r"\bmarshal\b|\bdill\b|yaml\.(unsafe_)?load\(|extractall\(|\b__import__\("
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "mpdit_jax").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line)
    ]
    assert found == []


def test_a_stored_config_is_data(tmp_path, trace):
    """The config in a workdir is read as JSON, and never runs as Python."""
    (tmp_path / "config.json").write_text(f"open({str(trace)!r}, 'w')")
    with pytest.raises(MPDiTError, match=r"config\.json cannot be read"):
        mp.load_checkpoint(tmp_path)
    (tmp_path / "config.py").write_text(f"open({str(trace)!r}, 'w')")
    with pytest.raises(MPDiTError):
        mp.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "path", ["https://example.com/c.py", "config.json", "mine.pkl", "/dev/stdin", "package.module"]
)
def test_a_config_is_a_python_file_of_the_command_line(tmp_path, path):
    with pytest.raises(ConfigError):
        main([f"--config={path}", f"--workdir={tmp_path / 'run'}"])


@pytest.mark.parametrize("name", ["../outside.array_record", "/etc/passwd", "a/../../b", "..", "", "shard\0x"])
def test_a_manifest_names_only_files_of_its_folder(tmp_path, name):
    from tests.data.test_latents import make_store

    make_store(tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    stored = json.loads(path.read_text())
    stored["shards"][0]["name"] = name
    path.write_text(json.dumps(stored))
    with pytest.raises(DataError, match=r"contradicts itself|is damaged"):
        read_manifest(tmp_path / "store")
    with pytest.raises(DataError):
        LatentStore(tmp_path / "store")


def test_names_in_an_archive_go_nowhere(tmp_path):
    """Entries of an .npz with paths outside its folder are not read, and nothing is extracted."""
    path = tmp_path / "in" / "mine.npz"
    path.parent.mkdir()
    np.savez(path, images=np.zeros((2, 8, 8, 1), np.uint8), labels=np.zeros(2, np.int64))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escaped.txt", "out")
        archive.writestr("/escaped.npy", "out")
    assert len(load_arrays(str(path))) == 2
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["in", "mine.npz"]


def test_a_picture_is_not_given_to_another_program(trace, tmp_path, monkeypatch):
    """EPS under the name of a PNG is refused; Pillow would run Ghostscript for it."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {trace}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    picture = tmp_path / "images" / "one" / "a.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    with pytest.raises(DataError, match=r"a\.png cannot be used"):
        open_set(str(picture.parent))
    with pytest.raises(UnidentifiedImageError):  # for which `prepare` rejects the picture by name
        open_images(str(tmp_path / "images")).open(0)[0].load()
