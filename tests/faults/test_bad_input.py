"""Bad input in bulk: whatever is wrong with it, our own error class says so, and no library's traceback gets out.

MPDIT_JAX_MUTATIONS=20000 raises the numbers tried.
"""

import gzip
import io
import json
import os
import struct
import zlib
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

import mpdit_jax as mp
from mpdit_jax.checkpoint import load_config
from mpdit_jax.config import defaults, model_of, resolve
from mpdit_jax.data.facts import read_facts
from mpdit_jax.data.idx import read_idx
from mpdit_jax.data.latent_store import LatentStore
from mpdit_jax.data.sources import check_fits, load_arrays, load_source
from mpdit_jax.errors import CheckpointError, DataError, InputError, MPDiTError, WeightsError
from mpdit_jax.mesh import check_batch, make_mesh
from mpdit_jax.model.parameters import abstract
from mpdit_jax.preparing.pictures import to_square
from mpdit_jax.preparing.store import _claim_settings
from mpdit_jax.sampling.blocks import Block, BlockFolder
from mpdit_jax.train import main
from mpdit_jax.training.optimizer import make_optimizer
from mpdit_jax.training.state import abstract_state
from mpdit_jax.training.step import make_draw, make_loss, make_step
from tests.data.test_latents import make_store
from tests.tiny import ROOT, train_arguments

MUTATIONS = int(os.environ.get("MPDIT_JAX_MUTATIONS", "1200"))
TINY = {
    "steps": 1, "batch_size": 4, "data.split": "all", "sample.every": 0, "model.patch_sizes": (2, 1), "model.depths": (1, 1),
    "model.hidden_size": 16, "model.num_heads": 2, "model.input_size": (8, 8), "model.in_channels": 1,
    "model.num_classes": 10, "model.class_tokens": 2, "model.fno_width": 4, "model.time_embedding": "sinusoidal",
}  # fmt: skip


def bulk(count):
    """So many examples, the same every time, however slow."""
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True, print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )  # fmt: skip


# What a person types into a config, mostly wrong. Sizes stay small where JAX would have to allocate them.
WHOLE = st.sampled_from([-(2**63), -7, -1, 0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 2**31, 2**32, 2**64])
REAL = st.sampled_from([float("nan"), float("inf"), -1.0, 0.0, 1e-30, 0.5, 0.999, 1.0, 2.5, 1e30, 1e308])
WORD = st.sampled_from(
    ["", "adamw", "muon", "cosine", "linear", "constant", "uniform", "logit_normal", "digits", "arrays", "latents",
     "fashion_mnist", "all", "train", "test", "float32", "bfloat16", "full", "dots", "none", "xla", "cudnn", "tokens",
     "vector", "shared", "block", "fno", "sinusoidal", "mpdit_b", "dit_b_2", "velocity", "sit", "paper", "manifest",
     "../x", "\0", "é" * 300]
)  # fmt: skip
TUPLE = st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 16, 2.5, "2", None, 2**40]), max_size=4).map(tuple)
VALUE = st.one_of(WHOLE, REAL, WORD, TUPLE, st.booleans(), st.none(), st.just({}), st.just([1]))
FIELD = st.sampled_from([*defaults(), "model.hiden_size", "unknown", "optimizer"])


def mutated(changes):
    """The tiny config with some fields replaced, as a config file that checks nothing would give it."""
    tree = {}
    for path, value in {**defaults(), **TINY, **changes}.items():
        *groups, field = path.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                return None
        place[field] = value
    return ConfigDict(tree)


@cache
def traces(model_config, batch, accumulation, optimizer, time, dropout, decay, spike):
    """Whether the whole step can be traced: shapes, dtypes and loss, gradient and update of every parameter."""
    config = mutated({"batch_size": batch})
    config.optimizer.update(dict(optimizer))
    config.time.update(dict(time))
    resolved = resolve(config)
    made = make_optimizer(resolved.optimizer)
    step = make_step(
        make_draw(resolved), make_loss(abstract(model_config)[0]), made, decay, accumulation=accumulation,
        spike_factor=spike,
    )  # fmt: skip
    shape = (batch, *model_config.input_size, model_config.in_channels)
    examples = {"x": jax.ShapeDtypeStruct(shape, jnp.float32), "y": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    state = abstract_state(model_config, made, make_mesh())
    after = jax.eval_shape(step, state, examples)
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, state)
    return True


def try_config(changes):
    """What `train` does with a config until its first step is compiled; whether it gets there."""
    config = mutated(changes)
    if config is None:
        return False
    try:
        resolved = resolve(config)
        model_config, mesh = model_of(resolved), make_mesh(**resolved.mesh)
        check_batch(resolved.batch_size // resolved.gradient_accumulation, mesh)
        source = load_source(**resolved.data)
        check_fits(source, (*model_config.input_size, model_config.in_channels), model_config.num_classes)
    except MPDiTError as error:
        assert str(error).strip(), changes
        return False
    assert traces(
        model_config, resolved.batch_size, resolved.gradient_accumulation, tuple(resolved.optimizer.items()),
        tuple(resolved.time.items()), resolved.label_dropout, resolved.ema_decay, resolved.skip.spike_factor,
    ), changes  # fmt: skip
    return True


def test_configs_are_traced_or_refused():
    outcome = {True: 0, False: 0}

    @bulk(MUTATIONS)
    @given(st.dictionaries(FIELD, VALUE, min_size=1, max_size=3))
    def one(changes):
        outcome[try_config(changes)] += 1

    one()
    print(f"{sum(outcome.values())} mutated configs: {outcome[True]} traced, {outcome[False]} refused")
    assert sum(outcome.values()) >= MUTATIONS
    assert min(outcome.values()) > MUTATIONS // 50


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"optimizer.name": "muon", "model.modulation": "block", "model.condition": "vector"},
    {"optimizer.clip_norm": 1.0, "time.distribution": "uniform", "model.dtype": "bfloat16", "model.remat": "full"},
    {"gradient_accumulation": 2, "skip.spike_factor": 5.0, "data.max_examples": 9, "data.class_balance": True},
])  # fmt: skip
def test_a_sample_of_them_is_run(tmp_path, changes):
    """What can be traced can be run: one real step each."""
    from mpdit_jax.training.loop import train

    assert try_config(changes)
    assert int(train(mutated(changes), tmp_path / "run").step) == 1


ARGUMENT = st.one_of(
    st.sampled_from([
        "--workdir=x", "--workdir=", "--workdir=s3://b", "--config", "--config=", "--config.steps", "--config.steps=",
        "--config.steps=3", "--config.model", "--config.model=3", "--config.model.depths[0]=2", "--config.model.depths[9]=2",
        "--config.model.depths=(", "--config.model.depths=1,", "--noconfig.model.skip", "--noconfig.steps", "--config.=3",
        "--config..x=1", "--config.optimizer.b1.x=2", "--config.seed=1e3", "--config.data.path=\0", "--num_processes=2",
        "--process_id=0", "--coordinator_address=h:1", "--join_timeout=-1", "--join_timeout=x", "--replay_step=0",
        "--replay_step=x", "--", "-", "", "-x", "=", "--=", "--config.model.skip=2", "--config.model.preset=no",
        "--config=configs/digits.py:argument",
    ]),
    st.builds("--config.{}={}".format, FIELD, st.one_of(st.text(max_size=8), WHOLE, REAL, TUPLE)),
    st.text(max_size=12),
)  # fmt: skip


class Reached(MPDiTError):
    """The command line was accepted."""


def test_command_lines(monkeypatch, capsys):
    """Status 2 and a sentence, our own error, or a config that training begins with."""
    counts = dict.fromkeys(("refused by the parser", "refused by a check", "accepted"), 0)

    def reached(config, workdir):
        resolve(config)
        raise Reached("fine")

    monkeypatch.setattr("mpdit_jax.training.loop.train", reached)
    monkeypatch.setattr("mpdit_jax.training.replay.replay", lambda config, workdir, step: reached(config, workdir))
    monkeypatch.setattr("mpdit_jax.train.join", lambda options, facts: None)

    @bulk(MUTATIONS // 4)
    @given(st.lists(ARGUMENT, max_size=4), st.booleans())
    def one(arguments, complete):
        before = [f"--config={ROOT / 'configs/digits.py'}", "--workdir=x"] if complete else []
        try:
            main([*before, *arguments])
        except Reached:
            counts["accepted"] += 1
        except MPDiTError:
            counts["refused by a check"] += 1
        except SystemExit as end:
            assert end.code == 2 or "--help" in arguments or "-h" in arguments
            assert len(capsys.readouterr().err.strip().splitlines()) <= 1
            counts["refused by the parser"] += 1

    one()
    print(f"command lines: {counts}")
    assert min(counts.values()) > 0


# Damage to the bytes of a file: flipped, cut off, inserted, repeated.
CUT = st.tuples(st.just("cut"), st.floats(0, 1), st.just(b""))
FLIP = st.tuples(st.just("flip"), st.floats(0, 1), st.binary(min_size=1, max_size=4))
INSERT = st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=64))
HEADER = st.tuples(st.just("flip"), st.floats(0, 0.2), st.binary(min_size=1, max_size=9))
DAMAGE = st.lists(st.one_of(CUT, FLIP, INSERT, HEADER), min_size=1, max_size=3)


def damaged(content, damage):
    for how, where, what in damage:
        place = int(where * len(content))
        if how == "cut":
            content = content[:place]
        elif how == "insert":
            content = content[:place] + what + content[place:]
        else:
            content = content[:place] + what + content[place + len(what) :]
    return content


def survives(path, content, read, expected, count=MUTATIONS // 8):
    """Read so many damaged versions of a file: each is read, or refused by the error that is expected."""
    outcome = {True: 0, False: 0}

    @bulk(count)
    @given(DAMAGE)
    def one(damage):
        path.write_bytes(damaged(content, damage))
        try:
            read(path)
        except expected as error:
            assert str(error).strip()
            outcome[False] += 1
        else:
            outcome[True] += 1

    one()
    path.write_bytes(content)
    read(path)
    print(f"{path.name}: {outcome[True]} read, {outcome[False]} refused")
    assert outcome[False]


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
    import zipfile

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
    monkeypatch.setattr("mpdit_jax.data.npz._memory", lambda: 2**24)
    with pytest.raises(DataError, match="do not fit into this machine's memory"):
        load_arrays(str(path))


def test_unfinished_samples(tmp_path):
    folder = BlockFolder(tmp_path / "blocks", {"seed": 0})
    numbers = np.arange(2)
    folder.write(0, Block(np.zeros((2, 8, 8, 1), np.uint8), numbers, numbers, np.ones(2, bool)))
    path = tmp_path / "blocks" / "00000000.npz"
    survives(path, path.read_bytes(), lambda path: folder.read(0), InputError)
    path = tmp_path / "blocks" / "settings.json"
    survives(path, path.read_bytes(), lambda path: BlockFolder(tmp_path / "blocks", {"seed": 0}), InputError)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
def test_idx(tmp_path, name):
    content = b"\0\0\x08\x03" + struct.pack(">3I", 5, 8, 8) + bytes(5 * 64)
    content = gzip.compress(content) if name.endswith(".gz") else content
    survives(tmp_path / name, content, read_idx, DataError)


def test_idx_bomb(tmp_path):
    """A header that promises 4 GiB, and a gzip file that would unpack to as much."""
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
    """As a file of `prepare`, which rejects it with a reason and goes on."""
    from concurrent.futures import ThreadPoolExecutor

    from mpdit_jax.preparing.image_sets import open_folder
    from mpdit_jax.preparing.shards import Work, _read

    path = tmp_path / "class" / f"a.{kind.lower()}"
    path.parent.mkdir()

    def read(path):
        images, rejected = open_folder(tmp_path), []
        work = Work(images, None, image_size=8, channels=3, latent_channels=1, batch_size=1, key_bytes=9, classes=1)
        with ThreadPoolExecutor(1) as pool:
            list(_read(range(1), work, pool, rejected))
        if rejected:
            raise DataError(rejected[0][1])

    survives(path, picture(kind), read, DataError, count=MUTATIONS // 20)


@pytest.mark.parametrize("size", [(60000, 60000), (16000, 9000), (1, 5000), (0, 4)])
def test_picture_bombs(size):
    """A few hundred bytes of PNG that unpack to gigabytes, or grow to them when the short side is made to fit."""
    header = struct.pack(">IIBBBBB", size[1], size[0], 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = zlib.compress(bytes(2**16))
    content += struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    with pytest.raises((InputError, Image.DecompressionBombError, OSError, SyntaxError)) as caught:
        to_square(Image.open(io.BytesIO(content)), 256, 3)
    assert not isinstance(caught.value, MemoryError)


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
    """A true state dict of which entries are missing, extra, misshapen or of another kind."""
    state = golden.group("parameters/") or golden.group("state/") or golden.group("weights/")
    assert state, sorted(golden.arrays)[:5]
    names = sorted(state)
    replacement = st.sampled_from([
        np.zeros(()), np.zeros((0, 3)), np.zeros((3, 5, 7)), np.array(["x"]), np.array([None]), "text", None, 3, object(),
        np.zeros((2,) * 9), np.full((4, 4), np.nan),
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
            assert str(error)
            refused += 1

    one()
    print(f"state dicts: {loaded} loaded, {refused} refused")
    assert refused


# Values of a JSON file replaced, removed and added.
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), WHOLE, REAL, WORD),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORD, inner, max_size=3)),
    max_leaves=4,
)


def changed_json(text, changes):
    tree = json.loads(text)
    for places, value, remove in changes:
        place = tree
        for depth, number in enumerate(places):
            if not isinstance(place, dict | list) or not place:
                break
            key = sorted(place)[number % len(place)] if isinstance(place, dict) else number % len(place)
            if depth == len(places) - 1 or not isinstance(place[key], dict | list):
                if remove:
                    del place[key]
                else:
                    place[key] = value
                break
            place = place[key]
    return json.dumps(tree)


CHANGES = st.lists(
    st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=3), JSON, st.booleans()), min_size=1, max_size=2
)


def json_survives(path, read, expected, count=MUTATIONS // 6):
    text = path.read_text()
    outcome = {True: 0, False: 0}

    @bulk(count)
    @given(CHANGES)
    def one(changes):
        path.write_text(changed_json(text, changes))
        try:
            read()
        except expected as error:
            assert str(error).strip()
            outcome[False] += 1
        else:
            outcome[True] += 1

    one()
    path.write_text(text)
    read()
    print(f"{path.name}: {outcome[True]} read, {outcome[False]} refused")
    assert outcome[False]
    survives(path, text.encode(), lambda path: read(), expected, count=count // 3)


def test_manifests(tmp_path):
    folder = make_store(tmp_path / "store")
    json_survives(folder / "manifest.json", lambda: LatentStore(folder), DataError)
    path = folder / "labels.npy"
    survives(path, path.read_bytes(), lambda path: LatentStore(folder), DataError)


def test_files_of_a_workdir(finished, tmp_path):
    """The config and the facts of a run; a config of another time is completed, or refused in a sentence."""
    for name in ("config.json", "data.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    json_survives(tmp_path / "config.json", lambda: load_config(tmp_path), CheckpointError)
    json_survives(tmp_path / "data.json", lambda: read_facts(tmp_path), CheckpointError)


def test_settings_of_prepare(tmp_path):
    (tmp_path / "prepare.json").write_text(json.dumps({"source": "x", "image_size": 8}))
    json_survives(
        tmp_path / "prepare.json", lambda: _claim_settings(tmp_path, {"source": "x", "image_size": 8}), InputError
    )


def test_a_config_of_an_older_version(finished, tmp_path):
    """Fields that it does not have get their defaults; one that is no longer known is named."""
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    stored = json.loads((finished / "config.json").read_text())
    del stored["checkpoint"]["grace"], stored["skip"], stored["profile"]
    (copy / "config.json").write_text(json.dumps(stored))
    assert load_config(copy) == load_config(finished)
    mp.load_checkpoint(copy)
    assert main(train_arguments(copy)) == 0
    (copy / "config.json").write_text(json.dumps({**stored, "warp": 9}))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: unknown config key config\.warp"):
        mp.load_checkpoint(copy)
