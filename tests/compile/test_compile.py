"""The compile command: figures of compiled programs, the search for settings that fit, and refused arguments."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from mpdit_jax.compile.__main__ import main as compile_command
from mpdit_jax.compile.collectives import traffic
from mpdit_jax.compile.measure import measure
from mpdit_jax.compile.programs import Program, _refused, compile_step, topology_devices
from mpdit_jax.compile.report import as_text, describe, smaller, step_flops
from mpdit_jax.config import base_config, resolve, shared_values
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import ConfigError
from mpdit_jax.runtime.hardware import CHIPS, topology_chip
from tests.tiny import ROOT, environment, run

TEXT = """HloModule step

%condition (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]) parameter(0)
  %limit = s32[] constant(6)
  %index = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%index, %limit), direction=LT
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = bf16[4,10]{1,0} all-gather(%part), replica_groups={{0,1}}, dimensions={0}
  %started = (bf16[2,10]{1,0}, bf16[4,10]{1,0}) all-gather-start(%part), replica_groups={{0,1}}
  %done = bf16[4,10]{1,0} all-gather-done(%started)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %sums = (f32[3]{0:T(128)}, bf16[5]{0}) all-reduce(%a, %b), to_apply=%add
  %scattered = f32[10]{0} reduce-scatter(%c), replica_groups=[2,4]<=[8], dimensions={0}
  %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body
  ROOT %copy = f32[8]{0} copy(%x)
}
"""


def test_traffic_by_kind_counts_loop_bodies_as_often_as_they_run():
    moved = traffic(TEXT, 8)
    found = moved.by_kind
    assert found["all-reduce"] == 3 * 4 + 5 * 2
    assert found["reduce-scatter"] == 10 * 4 * 4  # the whole array, of four chips
    assert found["all-gather"] == 6 * (80 + 80)
    assert found["all-to-all"] == found["collective-permute"] == 0
    # Rings of all eight chips without groups, of four, and of two.
    assert moved.sent == 2 * 22 * 7 / 8 + 160 * 3 / 4 + 960 / 2


def test_a_known_trip_count_comes_first():
    text = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert traffic(text, 8).by_kind["all-gather"] == 3 * 160


def test_a_real_program_of_eight_devices():
    program = """
import dataclasses, jax, json
from jax.sharding import NamedSharding, PartitionSpec as P
from mpdit_jax.compile.collectives import traffic
from mpdit_jax.distributed.mesh import make_mesh

mesh = make_mesh()
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
x = jax.ShapeDtypeStruct((64, 32), "float32", sharding=split)
w = jax.ShapeDtypeStruct((5, 32, 32), "float32", sharding=whole)

def loss(w, x):
    return (jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0] ** 2).mean()

compiled = jax.jit(jax.grad(loss), in_shardings=(whole, split), out_shardings=whole).lower(w, x).compile()
print(json.dumps(dataclasses.astuple(traffic(compiled.as_text(), 8))))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(8), check=True)
    found, sent, *_ = json.loads(done.stdout)
    # The gradient of five matrices is summed once, inside the loop or after it.
    assert found["all-reduce"] == pytest.approx(5 * 32 * 32 * 4, rel=0.01)
    assert sent == 2 * found["all-reduce"] * 7 / 8


def test_chips_and_topologies():
    assert topology_chip("v5e:16x16") is CHIPS["v5e"]
    for name, message in (("v7:4x4", "chip of v4, v5e"), ("v5e", "CHIP:SIZE"), ("v5e:4x4x4", "2 dimensions")):
        with pytest.raises(ConfigError, match=message):
            topology_chip(name)


@pytest.mark.parametrize(("topology", "asked"), [
    ("v4:2x2x4", {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}),
    ("v5e:4x4", {"chips_per_host_bounds": (2, 2, 1)}),
    ("v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
])  # fmt: skip
def test_arguments_of_libtpus_topology_description(monkeypatch, topology, asked):
    """Both cores of a v4 are one device, as on a real v4."""

    def described(**arguments):
        assert arguments == {"platform": "tpu", "topology_name": topology} | asked
        return SimpleNamespace(devices=["chip"])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("mpdit_jax.compile.programs.topologies.get_topology_desc", described)
    assert topology_devices(topology) == ["chip"]


def test_report_of_a_program_that_does_not_fit():
    program = Program(10 * 2**30, 10 * 2**30, 10 * 2**30, 20 * 2**30, 10**12, {"all-reduce": 10**9}, 10**9, 1.0)
    report = describe(program, 197e12 * 4, 2, CHIPS["v5e"])
    assert report["fits"] is False
    assert report["bound_by"] == "matrix products"
    assert report["bound_seconds"] == pytest.approx(2.0)
    assert "fits" not in describe(program, 1.0, 2, None)
    with_less_to_compute = describe(program, 1.0, 2, CHIPS["v5e"])
    assert with_less_to_compute["bound_by"] == "memory"
    assert with_less_to_compute["bound_seconds"] == pytest.approx(20 * 2**30 / 819e9)  # arguments read, results written
    assert "a bound, not a measurement" in as_text("step", report)


@pytest.mark.parametrize(("message", "temporaries"), [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (26.55G) exceeds "
     "available HBM (15.75G).", 26.55),
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.00G of "
     "15.75G hbm. Exceeded hbm capacity by 4.25G.", 20 - 1 / 1024),
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (1.02T) exceeds "
     "available HBM (15.75G).", 1.02 * 1024),
])  # fmt: skip
def test_the_compilers_out_of_memory_error_is_parsed(message, temporaries):
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arguments = {"x": jax.ShapeDtypeStruct((2**18,), "float32", sharding=whole)}  # a MiB
    program = _refused(message, arguments, 1.0)
    assert program.refused
    assert program.arguments == 2**20
    assert program.temporaries == pytest.approx(temporaries * 2**30, rel=1e-6)
    assert program.peak == program.arguments + program.temporaries
    report = describe(program, 1.0, 16, CHIPS["v5e"])
    assert report["fits"] is False
    text = as_text("train step", report)
    assert "does NOT fit 15.75 GiB" in text
    assert "early estimate" in text
    assert "collectives" not in text
    with pytest.raises(ConfigError, match="refuses this program: INTERNAL: something else"):
        _refused("INTERNAL: something else\nwith details", arguments, 1.0)


def test_smaller_settings_recompute_as_little_as_they_can():
    config = base_config()
    config.batch_size, config.model.preset = 16, "mpdit_b"
    resolved = resolve(config)
    flags = [name for name, _ in smaller(resolved, 4)]
    split = "--config.mesh.data=-1 --config.mesh.fsdp=4"
    assert flags == [
        split,
        "--config.model.remat=dots",
        f"{split} --config.model.remat=dots",
        "--config.model.remat=full",  # two parts would have fewer than 8 images per chip
        f"{split} --config.model.remat=full",
        f"{split} --config.model.remat=full --config.gradient_accumulation=2",
        f"{split} --config.model.remat=full --config.gradient_accumulation=4",
    ]
    config.mesh.data, config.mesh.fsdp = 4, -1  # -1 stands for 1: the state is not split
    assert next(smaller(resolve(config), 4))[0] == split
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.batch_size = 512
    assert next(smaller(resolve(config), 512))[0].endswith("fsdp=256")  # divides the width of 768
    config.mesh.fsdp, config.batch_size = 4, 64
    assert [name for name, _ in smaller(resolve(config), 4)] == [
        "--config.model.remat=dots",
        "--config.gradient_accumulation=2",
        "--config.model.remat=dots --config.gradient_accumulation=2",
        "--config.model.remat=full",
        *(f"--config.model.remat=full --config.gradient_accumulation={parts}" for parts in (2, 4, 8, 16)),
    ]
    candidates = dict(smaller(resolved, 4))
    for name, candidate in candidates.items():  # a config has the changes of its flags and none of an earlier candidate
        changes = dict(flag.removeprefix("--").split("=") for flag in name.split())
        assert shared_values(candidate) == shared_values(resolved) | changes
    plain, dots, full = (step_flops(config) for config in (resolved, *list(candidates.values())[1:4:2]))
    assert plain < dots < 1.05 * plain  # attention's products are repeated
    assert full == pytest.approx(4 / 3 * plain, rel=0.02)  # the blocks are repeated


@pytest.mark.slow
def test_compiled_operations_agree_with_the_analytic_count():
    """The operations of the compiled products are within 3 % of the analytic count, for every remat policy."""
    config = base_config()
    config.batch_size = 4
    config.model.update({"patch_sizes": (4, 2), "depths": (3, 2), "hidden_size": 192, "num_heads": 3})
    config.model.update({"input_size": (16, 16), "in_channels": 4, "num_classes": 10, "class_tokens": 4})
    # With platform "auto", virtual devices stand for accelerators; the CPU's kernels recompute a part of attention.
    for remat, platform in (("none", "auto"), ("dots", "auto"), ("full", "auto"), ("none", "cpu")):
        config.model.remat, config.model.platform = remat, platform
        resolved = resolve(config)
        program = compile_step(resolved, make_mesh(devices=jax.devices()[:1]))
        assert 0.97 < program.compiled_flops / step_flops(resolved) <= 1.03, (remat, platform)


def test_the_nearest_setting_that_fits_is_looked_for(monkeypatch, capsys):
    """On this chip only the last candidate fits."""
    tried = []

    def compiled(config, mesh, per_host):
        tried.append((config.model.remat, config.gradient_accumulation))
        peak = 2**30 if tried[-1] == ("full", 2) else 17 * 2**30
        return Program(2**20, peak - 2**20, 2**20, peak, 10, dict.fromkeys(("all-reduce", "all-gather"), 0), 0, 1.0)

    monkeypatch.setattr("mpdit_jax.compile.measure.compile_step", compiled)
    monkeypatch.setattr("mpdit_jax.compile.measure.topology_devices", lambda topology, slices: jax.devices()[:1])
    monkeypatch.setattr("mpdit_jax.compile.__main__.prepare", lambda devices, gpus: None)
    arguments = [f"--config={ROOT / 'configs/digits.py'}", "--topology=v5e:1x1", "--no_sampler"]
    assert compile_command([*arguments, "--format=json"]) == 1  # the config itself does not fit
    report = json.loads(capsys.readouterr().out)
    assert (report["step"]["fits"], report["nearest_fit"]["fits"]) == (False, True)
    assert report["nearest_fit"]["flags"] == "--config.model.remat=full --config.gradient_accumulation=2"
    parts = [(remat, parts) for parts in (1, 2, 4, 8) for remat in ("none", "dots")]
    assert tried == [*parts, ("full", 1), ("full", 2)]
    tried.clear()
    assert compile_command([*arguments, "--no_search"]) == 1
    assert len(tried) == 1
    assert "does NOT fit 15.75 GiB" in capsys.readouterr().out


def test_candidates_whose_state_alone_does_not_fit_are_skipped(monkeypatch, capsys):
    """On two chips: 32 GiB of state per chip with fsdp=1, 16 GiB with fsdp=2, 17 GiB of the sampler's parameters."""
    tried, sampled = [], []

    def step(config, mesh, per_host):
        tried.append(config.mesh.fsdp)
        state = 2**35 // config.mesh.fsdp
        return Program(state, 2**20, state, state + 2**20, None, None, None, 1.0, refused=True)

    def sampler(config, mesh, batch_size, per_host):
        sampled.append(batch_size)
        return Program(17 * 2**30, 2**20, 2**20, 17 * 2**30 + 2**20, 10, {}, 0, 1.0)

    monkeypatch.setattr("mpdit_jax.compile.measure.compile_step", step)
    monkeypatch.setattr("mpdit_jax.compile.measure.compile_sampler", sampler)
    monkeypatch.setattr("mpdit_jax.compile.measure.topology_devices", lambda topology, slices: jax.devices()[:1] * 2)
    monkeypatch.setattr("mpdit_jax.compile.__main__.prepare", lambda devices, gpus: None)
    assert compile_command([f"--config={ROOT / 'configs/digits.py'}", "--topology=v5e:1x2"]) == 1
    out = capsys.readouterr().out
    assert tried == [1, 2]  # neither is tried with another remat policy or with gradient accumulation
    assert sampled == [16]
    assert "nothing tried fits: take more chips or a smaller batch_size" in out
    assert "no batch tried fits: every chip holds all parameters" in out


def test_a_wrong_number_of_devices_is_refused():
    here = jax.device_count()
    with pytest.raises(ConfigError, match=f"--devices={here + 2}: JAX has {here}; unset XLA_FLAGS and JAX_PLATFORMS"):
        measure(base_config(), devices=here + 2)


def test_the_largest_batch_to_sample_that_fits_is_looked_for(monkeypatch, capsys):
    """The batch of eight is halved twice, until it fits."""

    def compiled(config, mesh, batch_size, per_host):
        peak = batch_size * 2**33
        return Program(2**20, peak - 2**20, 2**20, peak, 10, {}, 0, 1.0)

    monkeypatch.setattr("mpdit_jax.compile.measure.compile_sampler", compiled)
    monkeypatch.setattr("mpdit_jax.compile.measure.compile_step", lambda *_: compiled(*_[:2], 1, 0))
    monkeypatch.setattr("mpdit_jax.compile.measure.topology_devices", lambda topology, slices: jax.devices()[:1])
    monkeypatch.setattr("mpdit_jax.compile.__main__.prepare", lambda devices, gpus: None)
    arguments = [f"--config={ROOT / 'configs/digits.py'}", "--topology=v6e:1x1", "--format=json"]
    assert compile_command(arguments) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["step"]["fits"], report["sampler"]["fits"]) == (True, False)
    assert report["sampler"]["batch_size"] == 8
    assert report["nearest_sampler_fit"]["flags"] == "--sample_batch=2"
    assert [line for line in err.splitlines() if "trying" in line] == [
        "trying --sample_batch=4 ...", "trying --sample_batch=2 ...",
    ]  # fmt: skip
    assert compile_command([*arguments, "--no_search"]) == 1
    assert "trying" not in capsys.readouterr().err


def test_the_xl_config_recomputes_nothing_by_default():
    """The tests in test_topologies.py show that it fits without remat."""
    config = runpy.run_path(str(ROOT / "configs/mpdit_xl_256.py"))["get_config"]()
    assert config.model.remat == "none"


@pytest.mark.slow
def test_the_command_on_virtual_devices():
    arguments = [
        f"--config={ROOT / 'configs/digits.py'}",
        "--devices=4",
        "--format=json",
        "--config.mesh.fsdp=2",
        "--config.model.depths=1,1",
        "--config.sample.steps=3",
    ]
    status, stdout, stderr = run("compile", arguments)
    assert status == 0, stderr
    report = json.loads(stdout)
    assert report["step"]["compiled_flops"] == pytest.approx(report["step"]["flops"], rel=0.2)  # 16 images per chip
    assert (report["chips"], report["mesh"]) == (4, "data=2, fsdp=2")
    assert report["step"]["collectives"]["all-reduce"] > 0
    assert 0 < report["step"]["sent"] < 2 * sum(report["step"]["collectives"].values())
    assert report["step"]["peak"] >= report["step"]["arguments"] > 0
    assert report["sampler"]["batch_size"] == 32
    assert report["sampler"]["sent"] == 0


@pytest.mark.slow
def test_a_flow_maps_config_is_compiled_with_its_own_solver(monkeypatch, capsys):
    """The sampler of configs/digits_flow_map.py is one evaluation, and its step the one with the forward derivative."""
    monkeypatch.setattr("mpdit_jax.compile.__main__.prepare", lambda devices, gpus: None)
    smaller_model = ["--config.model.depths=1,1", "--config.batch_size=4", "--config.model.remat=none"]
    assert (
        compile_command(
            ["--config=digits_flow_map", f"--devices={jax.device_count()}", "--format=json", *smaller_model]
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    sampler, step = report["sampler"], report["step"]
    assert 0.8 < sampler["compiled_flops"] / sampler["flops"] <= 1.05
    assert 1.1 < step["compiled_flops"] / step["flops"] < 1.3  # half of the batch has a forward derivative


@pytest.mark.slow
def test_refusals():
    config = f"--config={ROOT / 'configs/digits.py'}"
    cases = [
        ([config], 2, "give either --topology or --devices"),
        ([config, "--devices=3"], 1, "batch_size=64 does not divide over 3 devices"),
        ([config, "--devices=2", "--sample_batch=3"], 1, "--sample_batch=3 does not divide over 2 devices"),
        ([config, "--topology=v9:2x2"], 1, "chip of v4, v5e"),
        ([config, "--topology=v5e:1024x1024"], 1, "1,048,576 chips; expected 1 to 256, a whole pod of v5e"),
        ([config, "--topology=v5e:0x4"], 1, "0 chips; expected 1 to 256"),
    ]
    if importlib.util.find_spec("libtpu") is None:
        cases.append(([config, "--topology=v5e:2x2"], 1, "pip install -e '.[tpu]'"))
    for arguments, expected, message in cases:
        status, _, stderr = run("compile", arguments)
        assert status == expected, stderr
        assert message in stderr
        assert "Traceback" not in stderr


def test_prepare_selects_the_cpu_after_jax_was_imported():
    """Without it, JAX would use the GPUs of a machine that has some."""
    program = (
        "from mpdit_jax.compile.environment import prepare; import jax; prepare(8); print(jax.config.jax_platforms)"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; print(len(jax.devices()))"],
        env=clean | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["cpu", "8"]
