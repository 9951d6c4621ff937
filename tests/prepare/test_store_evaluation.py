"""A store of latents is the reference of samples, of a run, and of a run in training, decoded by its own VAE."""

import json
import shutil

import numpy as np
import pytest

from mpdit_jax.config import base_config, resolve
from mpdit_jax.data.image_sets import open_set
from mpdit_jax.data.latent_store import MANIFEST, LatentStore
from mpdit_jax.data.pipeline import batches
from mpdit_jax.data.sources import load_source
from mpdit_jax.errors import InputError
from mpdit_jax.evaluate import __main__ as evaluate
from mpdit_jax.evaluate import command
from mpdit_jax.evaluate.classifier import ClassifierConfig, initialize, save_classifier
from mpdit_jax.evaluate.decoding import find_decode
from mpdit_jax.evaluate.shared_values import portable
from mpdit_jax.io import pictures as images
from mpdit_jax.prepare.__main__ import main as prepare
from mpdit_jax.train import loop
from mpdit_jax.train.evaluator import Evaluator
from mpdit_jax.train.loop import train
from mpdit_jax.vae import load_vae


@pytest.fixture(scope="module")
def stores(folder, vae_folder, tmp_path_factory):
    """Make a store of latents and one of pixels."""
    root = tmp_path_factory.mktemp("stores")
    for name, vae in (("latents", vae_folder), ("pixels", "none")):
        sizes = ("--image_size=8", "--batch_size=4", "--shard_size=5", "--flip=both")
        assert prepare([f"--images={folder}", f"--vae={vae}", f"--out={root / name}", *sizes]) == 0
    return root


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Make untrained classifiers as extractors, for grey and for RGB images."""
    root = tmp_path_factory.mktemp("classifiers")
    for channels in (1, 3):
        save_classifier(root / f"{channels}.safetensors", initialize(ClassifierConfig(8, 8, channels, 3), seed=0))
    return {channels: f"classifier:{root / f'{channels}.safetensors'}" for channels in (1, 3)}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Make random images, grey and RGB."""
    root, random = tmp_path_factory.mktemp("samples"), np.random.default_rng(0)
    for channels in (1, 3):
        np.savez(root / f"{channels}.npz", arr_0=random.integers(0, 256, (20, 8, 8, channels), np.uint8))
    return {channels: root / f"{channels}.npz" for channels in (1, 3)}


def distance(out, *arguments):
    assert evaluate.main(["--metrics=fd", f"--out={out}", *map(str, arguments)]) == 0
    [row] = json.loads(out.read_text())["results"]
    return row["metrics"]["FD(classifier)"]


@pytest.mark.slow
def test_a_store_of_latents_is_decoded_by_its_vae(stores, features, samples, vae_folder, other_vae, tmp_path):
    store = LatentStore(stores / "latents")
    decoded = np.asarray(load_vae(vae_folder).decode(store.moments(np.arange(12))[0][:, 0].astype(np.float32)))
    np.savez(tmp_path / "decoded.npz", arr_0=images.to_uint8(decoded))
    common = [f"--samples={samples[1]}", f"--features={features[1]}"]
    expected = distance(tmp_path / "a.json", *common, f"--reference={tmp_path / 'decoded.npz'}")
    reference = f"--reference={store.folder}"
    found = distance(tmp_path / "b.json", *common, reference, f"--vae={vae_folder}")
    assert found == pytest.approx(expected, rel=1e-3)
    assert found > 1e-3
    with pytest.raises(
        InputError, match=rf"--vae={other_vae} has fingerprint \w+… and .*latents holds latents of \w+…"
    ):
        evaluate.main([*common, reference, f"--vae={other_vae}", f"--out={tmp_path / 'c.json'}"])
    with pytest.raises(InputError, match="give --vae=FOLDER, the VAE that encoded it"):
        evaluate.main([*common, reference, f"--out={tmp_path / 'c.json'}"])
    assert not (tmp_path / "c.json").exists()


def test_a_store_of_pixels_needs_no_vae(stores, features, samples, tmp_path):
    store = LatentStore(stores / "pixels")
    pixels = images.to_uint8(store.moments(np.arange(12))[0][:, 0].astype(np.float32))
    np.savez(tmp_path / "pixels.npz", arr_0=pixels)
    common = [f"--samples={samples[3]}", f"--features={features[3]}"]
    expected = distance(tmp_path / "a.json", *common, f"--reference={tmp_path / 'pixels.npz'}")
    assert distance(tmp_path / "b.json", *common, f"--reference={store.folder}") == pytest.approx(expected, rel=1e-6)


def config_of(store, channels, features, reference="", vae=""):
    config = base_config()
    config.steps, config.batch_size = 1, 4
    config.model.update(
        patch_sizes=(2,),
        depths=(1,),
        hidden_size=16,
        num_heads=2,
        input_size=(8, 8) if channels == 3 else (4, 4),
        in_channels=channels,
        num_classes=3,
        class_tokens=2,
        time_embedding="sinusoidal",
    )
    config.data.update(name="latents", path=str(store), normalization="manifest")
    config.sample.update(every=1 if channels == 3 else 0, per_class=1, steps=1, vae=str(vae))
    config.eval.update(every=1, num_samples=6, steps=1, features=features, reference=str(reference), batch_size=6)
    return config


def evaluated(workdir):
    """Return the distance in the last line of a run's log."""
    *_, line = (json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines())
    return line["eval/FD(classifier)/guidance_1"]


@pytest.mark.slow
def test_a_run_on_latents_is_evaluated_on_its_way(stores, features, vae_folder, tmp_path, monkeypatch):
    """The reference is the run's own data, or a store given by name, which holds the same images here."""
    store, workdir, asked = stores / "latents", tmp_path / "run", []
    train(config_of(store, 2, features[1], vae=vae_folder), workdir)
    own = evaluated(workdir)
    assert own > 1e-3
    # The last evaluation's line is lost: the run, which continues with more threads, evaluates again.
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:-1]))
    config = config_of(store, 2, features[1], reference=store, vae=vae_folder)
    config.data.threads = 2
    monkeypatch.setattr(loop, "batches", lambda *args, threads, **more: asked.append(threads) or batches(*args, **more))
    train(config, workdir)
    assert asked == [2]
    assert evaluated(workdir) == pytest.approx(own, rel=1e-3)


def test_a_reference_of_another_vae_is_refused_before_the_training(stores, features, vae_folder, tmp_path):
    other = shutil.copytree(stores / "latents", tmp_path / "other")
    manifest = json.loads((other / MANIFEST).read_text()) | {"vae_fingerprint": "0" * 64}
    (other / MANIFEST).write_text(json.dumps(manifest))
    config = resolve(config_of(stores / "latents", 2, features[1], reference=other, vae=vae_folder))
    source = load_source(**config.data)
    with pytest.raises(InputError, match=r"config.sample.vae=.* and .*other holds latents of 000000000000…"):
        Evaluator(config, tmp_path, source, None, load_vae(vae_folder).decode, lambda: False)


@pytest.mark.slow
def test_a_store_that_was_prepared_again_is_another_set(stores, features, vae_folder, tmp_path):
    """The digests in its manifest tell it from a store of the same VAE, labels and sizes."""
    again, known = shutil.copytree(stores / "latents", tmp_path / "again"), []
    for digest in (None, "0" * 64):
        manifest = json.loads((again / MANIFEST).read_text())
        manifest["shards"][1]["sha256"] = digest or manifest["shards"][1]["sha256"]
        (again / MANIFEST).write_text(json.dumps(manifest))
        config = resolve(config_of(again, 2, features[1], vae=vae_folder))
        decode = load_vae(vae_folder).decode
        one = Evaluator(config, tmp_path, load_source(**config.data), None, decode, lambda: False)
        opened = open_set(str(again), find=find_decode(str(vae_folder)))
        known.append((one._own_images().about["contents"], portable(opened.about)["contents"]))
    assert known[0][0] == known[0][1]
    assert not set(known[0]) & set(known[1])


@pytest.mark.slow
def test_the_default_reference_of_a_run_is_what_it_was_trained_on(stores, features, vae_folder, tmp_path):
    """A store's part that `data.max_examples` and `data.class_balance` choose is the reference, as with images."""
    workdir, config = tmp_path / "run", config_of(stores / "latents", 2, features[1], vae=vae_folder)
    config.data.max_examples, config.eval.every = 5, 0
    train(config, workdir)
    options = evaluate.make_evaluate_parser().parse_args([f"--workdir={workdir}", f"--vae={vae_folder}"])
    images = command.make_reference(options, ["fd"]).own()
    whole = open_set(str(stores / "latents"), find=find_decode(str(vae_folder)))
    assert (len(images), images.about["count"]) == (5, 5)
    np.testing.assert_array_equal(images.read(np.arange(5)), whole.read(np.arange(5) * len(whole) // 5))


def test_the_vaes_precision_and_tiles_are_part_of_what_a_set_is(stores, vae_folder):
    sets = [
        open_set(str(stores / "latents"), find=find_decode(str(vae_folder), dtype, tile)).about
        for dtype, tile in (("float32", 0), ("bfloat16", 0), ("float32", 32))
    ]
    assert [(about["vae_dtype"], about["vae_tile"]) for about in sets] == [
        ("float32", 0), ("bfloat16", 0), ("float32", 32),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_on_pixels_is_evaluated_and_drawn_without_a_vae(stores, features, tmp_path):
    workdir = tmp_path / "run"
    train(config_of(stores / "pixels", 3, features[3]), workdir)
    assert evaluated(workdir) > 1e-3
    assert len(list((workdir / "samples").iterdir())) == 1  # the grid
    draw = [f"--workdir={workdir}", "--num_samples=6", "--steps=1", f"--features={features[3]}"]
    assert distance(tmp_path / "out.json", *draw) > 1e-3
