"""This version reads what 0.1.0 wrote on jax 0.10.2, with whichever JAX the tests use."""

import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export
from orbax.checkpoint import v1

import mpdit_jax as mp
from mpdit_jax.checkpoint import load_config
from mpdit_jax.data.latent_store import LatentStore
from mpdit_jax.model.parameters import split
from tests.conftest import relative_error
from tests.tiny import OPTIMIZED, assert_near, assert_same_bits, run, saved_arrays

HERE = Path(__file__).parent / "written_by_0_1_0"
CONFIG = f"""
from ml_collections import ConfigDict

from mpdit_jax.checkpoint import load_config


def get_config():
    return ConfigDict(load_config({str(HERE / "run")!r}).to_dict())
"""


def arrays(name):
    with np.load(HERE / name, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def saved(item):
    """One item of the checkpoint, by the parameters' dotted names."""
    found = {key.partition("[")[::2]: array for key, array in arrays("arrays_of_step_4.npz").items()}
    return {name.strip("'[]"): array for (kind, name), array in found.items() if kind == item}


def assert_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array, strict=True, err_msg=name)


@pytest.fixture
def workdir(tmp_path):
    """A copy of the run."""
    return Path(shutil.copytree(HERE / "run", tmp_path / "run"))


def test_the_config_loads():
    config = load_config(HERE / "run")
    assert (config.steps, config.batch_size, config.ema_decay, config.optimizer.eps) == (4, 8, 0.5, 1e-4)
    assert (config.model.patch_sizes, config.model.depths, config.model.hidden_size) == ((2, 1), (1, 1), 8)


@pytest.mark.parametrize(("ema", "item"), [(True, "ema_parameters"), (False, "parameters")])
def test_a_checkpoint_gives_the_bits_that_were_saved(ema, item):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is neither damaged nor without digests
        model = mp.load_checkpoint(HERE / "run", ema=ema)
    assert_bits(split(model)[1], saved(item))


def read_by_orbax_v1(workdir, step):
    """Read what `saved_arrays` reads, through the interface that Orbax 1.0 will have."""
    here, found = jax.sharding.SingleDeviceSharding(jax.devices()[0]), {}
    for item in ("parameters", "ema_parameters", "optimizer", "progress"):
        folder = (workdir / "checkpoints" / str(step)).resolve()
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            v1.metadata(folder, checkpointable_name=item).metadata,
        )
        leaves, _ = jax.tree_util.tree_flatten_with_path(v1.load(folder, target, checkpointable_name=item))
        found.update({f"{item}{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves})
    return found


def test_the_interface_of_orbax_1_gives_the_same_bits():
    found = read_by_orbax_v1(HERE / "run", 4)
    expected = arrays("arrays_of_step_4.npz")
    assert_bits({key: array for key, array in found.items() if key in expected}, expected)


def test_the_run_continues_to_what_it_would_have_been(workdir, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}", "--config.steps=8"]
    status, stdout, stderr = run("train", arguments, extra=OPTIMIZED)
    assert status == 0, stderr
    assert "continuing at step 4" in stdout
    found = saved_arrays(workdir, 8)
    expected = arrays("parameters_of_step_8.npz")
    assert {path for path in found if path.startswith("parameters")} == expected.keys()
    assert_near(found, expected)
    assert_same_bits(read_by_orbax_v1(workdir, 8), found)
    assert [line.split(",")[0] for line in (workdir / "metrics.jsonl").read_text().splitlines()] == [
        f'{{"step": {step}' for step in (2, 4, 6, 8)
    ]


def test_a_store_of_latents_is_verified_and_read():
    status, stdout, stderr = run("prepare", ["--verify", f"--out={HERE / 'latents'}"])
    assert status == 0, stderr
    assert "is as its manifest says: 12 latents" in stdout
    store, expected = LatentStore(HERE / "latents"), arrays("moments.npz")
    mean, std = store.moments(np.arange(len(store)))
    assert_bits({"mean": mean, "std": std, "labels": store.labels}, expected)


def test_a_store_knows_its_vae_again():
    assert mp.load_vae(HERE / "vae").fingerprint == LatentStore(HERE / "latents").manifest.vae_fingerprint


def test_an_exported_sampler_gives_the_same_images():
    sampler = export.deserialize(bytearray((HERE / "sampler.bin").read_bytes()))
    images = sampler.call(np.arange(3, dtype=np.int32), np.uint32(7), np.float32(2))
    assert relative_error(images, arrays("sampled.npz")["images"]) < 1e-5


def test_a_sampler_of_today_gives_the_same_images():
    model = mp.load_checkpoint(HERE / "run")
    images = mp.make_sampler(steps=2, guidance_scale=2.0)(model, np.arange(3), jax.random.key(7))
    assert relative_error(images, arrays("sampled.npz")["images"]) < 1e-5
