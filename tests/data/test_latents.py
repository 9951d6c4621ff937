"""Training draws latents from a store in a known order and records what sampling needs."""

import json
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mpdit_jax.convert.forms import _dataset_info
from mpdit_jax.data.info import DatasetInfo, record_dataset, write_dataset_info
from mpdit_jax.data.latent_store import (
    LABELS,
    MANIFEST,
    LatentStore,
    Manifest,
    Shard,
    allow_open_files,
    manifest_to_json,
    record_dtype,
    sha256,
)
from mpdit_jax.data.latents import PAPER_MEAN, PAPER_STD, LatentSpace
from mpdit_jax.data.pipeline import batch_at, batches
from mpdit_jax.data.sources import load_source
from mpdit_jax.errors import CheckpointError, DataError, InputError
from mpdit_jax.train.step import sample_latents


def make_store(folder, count=40, shape=(4, 4, 2), views=2, fingerprint="f" * 64, shard_size=16):
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True)
    random, shards = np.random.default_rng(0), []
    labels = (np.arange(count) % 4).astype(np.int32)
    for start in range(0, count, shard_size):
        rows = np.arange(start, min(start + shard_size, count))
        records = np.zeros(len(rows), record_dtype(shape, views, 4))
        records["mean"] = random.normal(2, 3, records["mean"].shape)
        records["std"] = random.uniform(0.1, 0.5, records["std"].shape)
        records["label"], records["key"] = labels[rows], [str(row).encode() for row in rows]
        path = folder / f"shard-{start:05d}.array_record"
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for record in records:
            writer.write(record.tobytes())
        writer.close()
        shards.append(Shard(path.name, len(rows), path.stat().st_size, sha256(path)))
    np.save(folder / LABELS, labels)
    channels = shape[2]
    manifest = Manifest(
        latent_shape=shape,
        views=views,
        key_bytes=4,
        image_size=8,
        vae_fingerprint=fingerprint,
        class_names=("a", "b", "c", "d"),
        class_counts=tuple(np.bincount(labels).tolist()),
        latent_mean=(2.0,) * channels,
        latent_std=(3.0,) * channels,
        scaling_factor=0.25,
        shift_factor=-1.0,
        rejected=0,
        source="random",
        labels_sha256=sha256(folder / LABELS),
        shards=tuple(shards),
    )
    (folder / MANIFEST).write_text(manifest_to_json(manifest))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stores") / "store")


def source_of(store, **more):
    return load_source("latents", str(store), "train", normalization="manifest", **more)


def test_any_order_gives_the_records_asked_for(store):
    opened = LatentStore(store)
    indices = np.array([39, 0, 17, 17, 3, 32])
    assert [int(key) for key in opened.read(indices)["key"]] == indices.tolist()


def test_a_store_of_many_shards_may_open_them_all_or_says_why_not(monkeypatch):
    for hard, raised in ((20_000, [(5_512, 20_000)]), (resource.RLIM_INFINITY, [(5_512, resource.RLIM_INFINITY)])):
        calls = []
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (1024, hard))
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits, calls=calls: calls.append(limits))
        allow_open_files(100, "store")
        assert calls == []
        allow_open_files(5_000, "store")
        assert calls == raised
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    with pytest.raises(DataError, match=r"store has 5000 shards and this process may open 4096 files: .*--shard_size"):
        allow_open_files(5_000, "store")


def test_a_channel_without_spread_is_no_reason_to_divide_by_zero(store, tmp_path):
    stored = json.loads((store / MANIFEST).read_text())
    folder = shutil.copytree(store, tmp_path / "flat")
    (folder / MANIFEST).write_text(json.dumps(stored | {"latent_std": [3.0, 0.0]}))
    with pytest.raises(DataError, match=r"channel 1 of the latents has standard deviation 0.*'manifest' would divide"):
        source_of(folder)
    assert len(load_source("latents", str(folder), "train", normalization="vae")) == 40
    (folder / MANIFEST).write_text(json.dumps(stored | {"latent_std": [-3.0, 3.0]}))
    with pytest.raises(DataError, match=r"manifest\.json contradicts itself"):
        LatentStore(folder)


def test_the_vaes_scaling_and_shift_are_honoured(store):
    space = load_source("latents", str(store), "train", normalization="vae").latents
    assert (space.mean, space.std) == ((-1.0, -1.0), (4.0, 4.0))  # shift_factor, 1 / scaling_factor
    moments = {"mean": np.full((1, 1, 4, 4, 2), 7, np.float16), "std": np.zeros((1, 1, 4, 4, 2), np.float16)}
    assert (np.asarray(sample_latents(jax.random.key(0), moments, space)) == (7 - -1) * 0.25).all()


SDXL = (-1.66, 1.89, -1.38, 2.52), (8.49, 5.90, 6.55, 5.23)  # measured by others, on other pictures


@pytest.mark.parametrize(
    ("measured", "fits"), [((PAPER_MEAN, PAPER_STD), True), (SDXL, False), (((0.0,) * 4, (1.0,) * 4), False)]
)
def test_the_papers_constants_have_to_fit(tmp_path, measured, fits):
    folder = make_store(tmp_path / "store", shape=(4, 4, 4))
    stored = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(stored | dict(zip(("latent_mean", "latent_std"), measured, strict=True))))
    papers, own, chosen = (
        load_source("latents", str(folder), "train", normalization=name) for name in ("paper", "manifest", "auto")
    )
    assert chosen.latents == (papers if fits else own).latents
    record_dataset(tmp_path, own, trained=False)
    if fits:
        record_dataset(tmp_path, papers, trained=False)
        return
    message = rf"means 5\.81, .* 4\.17, .*these latents have means {measured[0][0]:.3g}, .*set it to 'manifest'"
    with pytest.raises(DataError, match=message):
        record_dataset(tmp_path, papers, trained=False)
    data = SimpleNamespace(name="latents", path=str(folder), normalization="paper")
    with pytest.raises(DataError, match=message):  # `convert` would record the constants together with the VAE
        _dataset_info(SimpleNamespace(data=None), SimpleNamespace(data=data))
    (tmp_path / "data.json").unlink()
    record_dataset(tmp_path, papers, trained=True)  # a run that has begun with these constants may continue
    # Unless `convert` made it, which sees no latents and writes the paper's constants.
    write_dataset_info(tmp_path, DatasetInfo((), LatentSpace(PAPER_MEAN, PAPER_STD, "")))
    with pytest.raises(DataError, match=message):
        record_dataset(tmp_path, papers, trained=True)


def test_the_vaes_own_factors_have_to_fit(store, tmp_path):
    folder = shutil.copytree(store, tmp_path / "store")
    stored = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(stored | {"scaling_factor": 1.0}))
    source = load_source("latents", str(folder), "train", normalization="vae")
    with pytest.raises(DataError, match=r"normalization='vae' has means -1, -1 and .*deviations 1, 1, .*to 'manifest'"):
        record_dataset(tmp_path, source, trained=False)


def test_every_epoch_visits_each_example_once_in_a_new_order(store):
    class Keys:
        def __len__(self):
            return 40

        def batch(self, indices):
            return {"key": indices}

    epochs = [np.concatenate([batch_at(Keys(), 10, 5, s)["key"] for s in range(e, e + 4)]) for e in (0, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_rows_of_several_processes_make_the_one_batch(store):
    source = source_of(store)
    whole = batch_at(source, 8, seed=1, step=7)
    parts = [next(batches(source, 8, seed=1, start=7, rows=rows)) for rows in (slice(0, 3), slice(3, 8))]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_the_number_of_threads_changes_no_batch(store, threads):
    source, found = source_of(store), batches(source_of(store), 8, seed=1, threads=threads)
    for step in range(12):
        expected, batch = batch_at(source, 8, seed=1, step=step), next(found)
        for name, array in expected.items():
            np.testing.assert_array_equal(batch[name], array)


def test_a_visit_draws_from_the_posterior_of_either_view():
    shape = (4000, 2, 1, 1, 1)
    mean = np.broadcast_to(np.array([-1.0, 5.0]).reshape(1, 2, 1, 1, 1), shape).astype(np.float16)
    std = np.full(shape, 0.5, np.float16)
    x = np.asarray(sample_latents(jax.random.key(0), {"mean": mean, "std": std}, LatentSpace((2.0,), (3.0,), "")))
    assert x.shape == (4000, 1, 1, 1)
    flipped = x > 0
    assert 0.45 < flipped.mean() < 0.55
    # Normalized: (−1 − 2) / 3 and (5 − 2) / 3, spread 0.5 / 3.
    np.testing.assert_allclose([x[~flipped].mean(), x[flipped].mean()], [-1, 1], atol=0.02)
    np.testing.assert_allclose([x[~flipped].std(), x[flipped].std()], [0.5 / 3] * 2, rtol=0.06)
    again = sample_latents(jax.random.key(1), {"mean": mean, "std": std}, LatentSpace((2.0,), (3.0,), ""))
    assert not np.array_equal(x, again)


def test_a_damaged_record_names_its_shard(tmp_path):
    folder = make_store(tmp_path / "store")
    path = folder / "shard-00016.array_record"
    content = bytearray(path.read_bytes())
    content[300:3000] = bytes(2700)
    path.write_bytes(content)
    opened = LatentStore(folder)
    opened.read(np.arange(16))
    with pytest.raises(DataError, match=r"shard-00016.array_record is damaged .*--verify"):
        opened.read(np.arange(40))


def config_of(store, steps=2):
    from mpdit_jax.config import base_config

    config = base_config()
    config.steps, config.batch_size = steps, 8
    config.model.update(
        patch_sizes=(2, 1),
        depths=(1, 1),
        hidden_size=16,
        num_heads=2,
        input_size=(4, 4),
        in_channels=2,
        num_classes=4,
        class_tokens=2,
        time_embedding="sinusoidal",
    )
    config.data.name, config.data.path, config.data.normalization = "latents", str(store), "manifest"
    return config


@pytest.mark.slow
def test_a_run_keeps_what_sampling_needs_and_refuses_another_vae(store, tmp_path):
    from mpdit_jax.sample.decoding import make_decode
    from mpdit_jax.train.loop import train

    workdir = tmp_path / "run"
    train(config_of(store), workdir)
    facts = json.loads((workdir / "data.json").read_text())
    assert facts["class_names"] == ["a", "b", "c", "d"]
    assert facts["latents"] == {"mean": [2.0, 2.0], "std": [3.0, 3.0], "vae_fingerprint": "f" * 64}
    other = make_store(tmp_path / "other", fingerprint="e" * 64)
    with pytest.raises(CheckpointError, match=r"latents of another VAE or normalization .*VAE ffff.*VAE eeee"):
        train(config_of(other, steps=4), workdir)
    with pytest.raises(InputError, match="give --vae=FOLDER, the VAE they come from"):
        make_decode(str(workdir), "")


def test_latents_of_another_shape_are_refused(store, tmp_path):
    from mpdit_jax.train.loop import train

    config = config_of(store)
    config.model.in_channels = 3
    with pytest.raises(DataError, match=r"\(4, 4, 2\) and the model takes \(4, 4, 3\)"):
        train(config, tmp_path / "run")
    config = config_of(store)
    config.model.num_classes = 3
    with pytest.raises(DataError, match="4 classes and the model 3"):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_memory_does_not_grow_over_an_epoch(tmp_path):
    """The first epoch opens every shard and reads every record; 19 more show whether one record in 100 is kept."""
    store = make_store(tmp_path / "store", count=4096, shape=(32, 32, 4), views=1, shard_size=32)
    program = """
import sys
from mpdit_jax.data.pipeline import batches
from mpdit_jax.data.sources import load_source

def resident():
    return int(open("/proc/self/statm").read().split()[1])

source = load_source("latents", sys.argv[1], "train", normalization="manifest")
data, epoch = batches(source, 8, seed=0), len(source) // 8
for step in range(20 * epoch):
    next(data)
    if step == 4:
        first = resident()
    elif step > 4 and (step + 1) % (epoch // 4) == 0:
        print(resident() / first)
"""
    done = subprocess.run([sys.executable, "-c", program, str(store)], capture_output=True, text=True, check=True)
    sizes = [float(size) for size in done.stdout.split()]
    assert len(sizes) == 80
    assert max(sizes) < 1.05, sizes
