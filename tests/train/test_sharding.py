"""The same run on one device and on eight."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mpdit_jax.distributed.mesh import _device_grid, check_batch, make_mesh, parameter_sharding
from mpdit_jax.errors import ConfigError
from tests.tiny import COMPARABLE, TWO_LEVELS, assert_near, environment, losses, run, saved_arrays, train_arguments

STEPS = 20
LONG = [f"--config.steps={STEPS}", "--config.checkpoint.every=10", "--config.log.every=1", COMPARABLE, *TWO_LEVELS]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert run("train", train_arguments(workdir, *LONG))[0] == 0
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(-1, 1), (1, 8), (4, 2)])
def test_eight_devices_give_the_same_run(one_device, tmp_path, monkeypatch, data, fsdp):
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    workdir = tmp_path / "run"
    mesh = [f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}"]
    status, stdout, stderr = run("train", train_arguments(workdir, *LONG, *mesh), devices=8)
    assert status == 0, stderr
    assert "8 cpu device(s)" in stdout
    assert 3 < stderr.count("Finished XLA compilation") < 30  # none for each array that is saved

    np.testing.assert_allclose(losses(workdir), losses(one_device), rtol=1e-5)
    assert_near(saved_arrays(workdir, STEPS), saved_arrays(one_device, STEPS))


@pytest.mark.slow
def test_muon_in_parts_on_eight_devices_gives_the_run_of_one(tmp_path):
    """Muon multiplies whole matrices, of which each device holds a part, and clips by their common norm."""
    muon = [*LONG, "--config.steps=10", "--config.batch_size=16", "--config.optimizer.name=muon"]
    muon.append("--config.optimizer.clip_norm=0.1")
    alone, apart = tmp_path / "alone", tmp_path / "apart"
    assert run("train", train_arguments(alone, *muon))[0] == 0
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.gradient_accumulation=2"]
    status, _, stderr = run("train", train_arguments(apart, *muon, *mesh), devices=8)
    assert status == 0, stderr
    np.testing.assert_allclose(losses(apart), losses(alone), rtol=1e-5)
    assert_near(saved_arrays(apart, 10), saved_arrays(alone, 10))


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_continues_on_one(one_device, tmp_path):
    workdir, mesh = tmp_path / "run", ["--config.mesh.data=2", "--config.mesh.fsdp=4"]
    assert run("train", train_arguments(workdir, *LONG, *mesh, "--config.steps=10"), devices=8)[0] == 0
    status, stdout, stderr = run("train", train_arguments(workdir, *LONG))
    assert status == 0, stderr
    assert "continuing at step 10" in stdout
    assert_near(saved_arrays(workdir, STEPS), saved_arrays(one_device, STEPS))


@pytest.mark.slow
def test_eight_devices_draw_what_one_draws(one_device, tmp_path):
    """A checkpoint is loaded, and a grid drawn, on any number of devices."""
    found = {}
    for devices in (1, 8):
        out = tmp_path / f"{devices}.npz"
        arguments = [f"--workdir={one_device}", "--labels=3,5", "--num_samples=8", "--steps=4", f"--out={out}"]
        status, _, stderr = run("sample", arguments, devices=devices)
        assert status == 0, stderr
        with np.load(out, allow_pickle=False) as archive:
            found[devices] = archive["arr_0"]
    assert np.abs(found[1].astype(int) - found[8]).max() <= 1
    assert found[1].std() > 10


@pytest.mark.slow
def test_fsdp_really_divides_the_state(tmp_path):
    """On 8 devices no device holds more than its share of the large arrays."""
    script = """
import jax
from mpdit_jax.config import base_config, resolve
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state, create_state
mesh = make_mesh(data=1, fsdp=8)
config = ModelConfig(depths=(2, 1), hidden_size=128, num_heads=4, input_size=8, num_classes=10)
optimizer = make_optimizer(resolve(base_config()).optimizer)
state = create_state(config, optimizer, abstract_state(config, optimizer, mesh), 0)
whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
share = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
print(share / whole)
"""
    share = float(run_script(script))
    assert 1 / 8 <= share < 0.35  # an eighth, and the small replicated arrays


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_on_eight_devices_is_updated_in_place(optimizer):
    """No device copies a buffer of the state, with clipping and accumulation (one device: tests/train/test_step.py)."""
    script = f"""
import jax, numpy as np
from mpdit_jax.config import base_config, model_config, resolve
from mpdit_jax.distributed.mesh import local_rows, make_mesh, place_batch
from mpdit_jax.model.parameters import abstract
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state, create_state
from mpdit_jax.train.step import jit_step, make_noising, make_loss, make_step
config = base_config()
config.batch_size = 16
config.optimizer.update({{"name": {optimizer!r}, "clip_norm": 1.0}})
config.model.update({{"patch_sizes": (4, 2), "depths": (2, 1), "hidden_size": 64, "num_heads": 2}})
config.model.update({{"input_size": (8, 8), "in_channels": 4, "num_classes": 10}})
config = resolve(config)
model, optimizer, mesh = model_config(config), make_optimizer(config.optimizer), make_mesh(data=2, fsdp=4)
step = make_step(make_noising(config), make_loss(abstract(model)[0]), optimizer, 0.9, accumulation=2)
batch = {{"x": np.zeros((16, 8, 8, 4), np.float32), "y": np.zeros(16, np.int32)}}

def pointers(state):
    leaves = jax.tree.leaves((state.parameters, state.ema_parameters, state.optimizer_state))
    return [shard.data.unsafe_buffer_pointer() for leaf in leaves for shard in leaf.addressable_shards]

with jax.set_mesh(mesh):
    target = abstract_state(model, optimizer, mesh)
    before, update = create_state(model, optimizer, target, 0), jit_step(step, target, mesh)
    batch = place_batch(batch, local_rows(16, mesh), 16, mesh)
    share = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(before))
    print(update.lower(before, batch).compile().memory_analysis().alias_size_in_bytes - share)
    places = pointers(before)
    after = update(before, batch)
    print(sum(old != new for old, new in zip(places, pointers(after), strict=True)))
    print(sum(not leaf.is_deleted() for leaf in jax.tree.leaves(before)))
"""
    assert run_script(script).split() == ["0", "0", "0"]


def run_script(script):
    done = subprocess.run([sys.executable, "-c", script], env=environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_impossible_meshes_are_refused():
    devices = jax.devices()[:1]
    for sizes, sentence in [
        ({"data": 3}, "does not fit 1 cpu device"),
        ({"data": -1, "fsdp": 2}, "does not fit 1 cpu device"),
        ({"data": 0}, "mesh.data=0"),
        ({"data": -1, "fsdp": -1}, "at most one axis"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            make_mesh(**sizes, devices=devices)


def devices_of(platform, slices, each):
    """Return stand-ins for devices of several hosts or slices, in JAX's order."""
    return [
        SimpleNamespace(
            id=number, platform=platform, device_kind="any", slice_index=number // each, process_index=number // each,
            coords=(number % each, 0, 0), core_on_chip=0,
        )
        for number in range(slices * each)
    ]  # fmt: skip


def test_gpus_of_several_nodes():
    """JAX takes each node for a slice, and its own `make_mesh` refuses them; a split state stays within a node."""
    arranged = _device_grid(4, 4, devices_of("gpu", 2, 8))
    assert [[device.id for device in row] for row in arranged] == np.arange(16).reshape(4, 4).tolist()
    assert _device_grid(1, 16, devices_of("gpu", 2, 8)).shape == (1, 16)


def test_tpus_of_several_slices():
    arranged = _device_grid(4, 2, devices_of("tpu", 2, 4))
    for row in arranged:
        assert len({device.slice_index for device in row}) == 1
    with pytest.raises(ConfigError, match=r"mesh\.data=1, mesh\.fsdp=8 does not fit 2 TPU slices: .* a multiple of 2"):
        _device_grid(1, 8, devices_of("tpu", 2, 4))


@pytest.mark.parametrize(("size", "expected"), [
    (16, (None, "fsdp", None)), (256, (None, None, "fsdp")), (5, ()),
])  # fmt: skip
def test_what_does_not_divide_is_split_elsewhere(size, expected):
    mesh = jax.sharding.AbstractMesh((1, size), ("data", "fsdp"))
    assert tuple(parameter_sharding(mesh, "levels.0.blocks.layers.mlp.inner.kernel", (22, 1152, 4608)).spec) == expected


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    alone = make_mesh(devices=jax.devices()[:1])
    check_batch(7, alone)
    check_batch(8, alone, parts=4)
    with pytest.raises(ConfigError, match=r"batch_size=6 does not divide .* in gradient_accumulation=4 parts: .* as 8"):
        check_batch(6, alone, parts=4)
    status, _, stderr = run("train", train_arguments(tmp_path / "run", "--config.batch_size=12"), devices=8)
    assert status == 1
    assert "batch_size=12 does not divide over 8 devices: use a multiple of 8, such as 16" in stderr
    assert not (tmp_path / "run").exists()
