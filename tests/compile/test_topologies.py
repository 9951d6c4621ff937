"""The compile command with libtpu, for TPUs that this machine lacks."""

import importlib.util
import json
import os
from unittest import mock

import pytest

from tests.tiny import OPTIMIZED, ROOT, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[test,tpu]'"
    ),
]


def compiled(topology, *fields, only_step=True):
    """Compile a small latent model for four chips, 16 images on each, and return the report."""
    arguments = [
        f"--config={ROOT / 'configs/mpdit_b_256.py'}", f"--topology={topology}", "--format=json",
        "--config.sample.steps=2", "--config.batch_size=64", "--config.model.preset=", "--config.model.hidden_size=256",
        "--config.model.num_heads=4", "--config.model.depths=2,2", *fields, *["--no_sampler"] * only_step,
    ]  # fmt: skip
    status, stdout, stderr = run("compile", arguments, extra=OPTIMIZED)
    assert status == 0, stderr
    return json.loads(stdout)


def described(topology):
    """Return the topology's devices, in this process."""
    from mpdit_jax.compile.environment import prepare
    from mpdit_jax.compile.programs import topology_devices

    with mock.patch.dict(os.environ):  # restores the environment, which `prepare` changes
        prepare()
        return topology_devices(topology)


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_every_kind_of_chip(topology):
    report = compiled(topology)
    step = report["step"]
    assert (report["chips"], report["mesh"]) == (4, "data=4, fsdp=1")
    assert step["fits"]
    assert 0.97 < step["compiled_flops"] / step["flops"] <= 1.03
    assert 0 < step["bound_seconds"] < 1e-2


def test_two_slices():
    """The gradients are summed in each slice first, so that a chip sends 1/4 of them to the other slice."""
    step = compiled("v5e:2x2", "--slices=2")["step"]
    gradients = step["arguments"] / 4
    assert step["fits"]
    assert 0 < step["crossed"] < step["sent"] < 2 * gradients


def test_the_sampler():
    """Every chip has all parameters and both passes of guidance, so nothing is sent."""
    sampler = compiled("v5e:2x2", only_step=False)["sampler"]
    assert sampler["fits"]
    assert sampler["batch_size"] == 32
    assert 0.97 < sampler["compiled_flops"] / sampler["flops"] <= 1.1  # of two steps; one-time work is up to 10 %
    assert sampler["sent"] == 0


def test_memory_of_the_xl_config_by_remat_policy():
    """On 16 v5e chips, as in docs/scaling.md; the config has remat `none`."""
    arguments = [
        f"--config={ROOT / 'configs/mpdit_xl_256.py'}", "--topology=v5e:4x4", "--config.mesh.fsdp=16",
        "--no_sampler", "--no_search", "--format=json",
    ]  # fmt: skip
    for remat, most in (("none", 15.0), ("dots", 10.0), ("full", 3.8)):
        process = run("compile", [*arguments, f"--config.model.remat={remat}"], extra=OPTIMIZED)
        assert process[0] == 0, process[2]
        step = json.loads(process[1])["step"]
        assert step["peak"] < most * 2**30
        assert 0.97 < step["compiled_flops"] / step["flops"] <= 1.03


def test_memory_and_traffic_of_a_split_state():
    whole, split = (compiled("v5e:2x2", f"--config.mesh.fsdp={fsdp}")["step"] for fsdp in (1, 4))
    assert split["arguments"] < 0.3 * whole["arguments"]
    # With copies of the state, the gradients are summed in a ring of four, which sends 3/4 of the array twice, in
    # float32, or in bfloat16 where the gradient's product is bfloat16.
    gradients = whole["arguments"] / 4  # the arguments are parameters, EMA and Adam's two moments
    assert gradients * 3 / 4 < whole["sent"] < 2 * gradients * 3 / 4
    # A split state is gathered in the forward and in the backward pass, and its gradients are scattered.
    assert 0.5 * gradients < split["sent"] < 3 * gradients
    assert split["collectives"]["all-gather"] + split["collectives"]["collective-permute"] > 0


def test_a_step_too_large_for_its_chip_is_reported_and_a_smaller_one_found():
    arguments = [
        f"--config={ROOT / 'configs/mpdit_b_256.py'}", "--topology=v5e:2x2", "--format=json", "--no_sampler",
        "--config.batch_size=640", "--config.model.remat=none",
    ]  # fmt: skip
    status, stdout, stderr = run("compile", arguments, extra=OPTIMIZED)
    assert status == 1, stderr
    report = json.loads(stdout)
    assert report["step"]["refused"]
    assert report["step"]["peak"] > report["step"]["hbm"]
    assert report["nearest_fit"]["fits"]
    assert report["nearest_fit"]["flags"] in stderr


@pytest.mark.parametrize(("topology", "chips"), [("v5e:1x1", 1), ("v6e:1x1", 1), ("v5e:2x4", 8)])
def test_a_slice_of_one_host(topology, chips):
    assert len(described(topology)) == chips


def test_a_topology_that_libtpu_does_not_know():
    status, _, stderr = run("compile", [f"--config={ROOT / 'configs/digits.py'}", "--topology=v5e:3x5"])
    assert status == 1
    assert "--topology=v5e:3x5: libtpu refuses it" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("topology", "fsdp"), [("v6e:8x8", 16), ("v4:4x4x4", 8), ("v5p:4x4x4", 32), ("v6e:4x8", 2)])
def test_meshes_that_cut_an_axis_of_the_torus(topology, fsdp):
    """`jax.make_mesh` makes such meshes for v5e alone."""
    from mpdit_jax.distributed.mesh import make_mesh

    mesh = make_mesh(fsdp=fsdp, devices=described(topology))
    assert mesh.shape["fsdp"] == fsdp
    assert len({device.id for device in mesh.devices.flat}) == mesh.size
