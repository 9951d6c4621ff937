"""The compile command for NVIDIA GPUs that this machine lacks."""

import importlib.util
import json
import os
import re
from pathlib import Path
from unittest import mock

import pytest

from mpdit_jax.compile import environment
from mpdit_jax.compile.gpus import CARDS, parse_cluster, target_config
from mpdit_jax.errors import ConfigError, MissingExtraError
from tests.tiny import OPTIMIZED, ROOT, run


@pytest.mark.parametrize(("topology", "hosts", "per_host"), [
    ("a100:8", 1, 8), ("a100-40gb:1", 1, 1), ("h100:64", 8, 8), ("h200:2x4", 2, 4), ("b200:3x8", 3, 8),
])  # fmt: skip
def test_clusters(topology, hosts, per_host):
    cluster = parse_cluster(topology)
    assert (cluster.card, cluster.hosts, cluster.per_host) == (CARDS[topology.partition(":")[0]], hosts, per_host)
    assert cluster.size == hosts * per_host


@pytest.mark.parametrize(("topology", "sentence"), [
    ("a100", "expected a100:GPUS or a100:HOSTSxGPUS, such as a100:2x8"),
    ("h100:8x8x8", "expected h100:GPUS or h100:HOSTSxGPUS"),
    ("a100:12", "hosts have up to 8 GPUs; expected at most 8 or a multiple of 8, or say how many each has"),
    ("a100:2x16", "2 hosts of 16 GPUs; expected 1 host or more of 1 to 8"),
    ("a100:0", "1 hosts of 0 GPUs"), ("a100:0x8", "0 hosts of 8 GPUs"),
])  # fmt: skip
def test_impossible_clusters(topology, sentence):
    with pytest.raises(ConfigError, match=re.escape(f"--topology={topology}: {sentence}")):
        parse_cluster(topology)


def test_an_unknown_card_is_refused():
    status, _, stderr = run("compile", ["--config=digits", "--topology=a10:8"])
    assert status == 1
    assert "expected CHIP:SIZE with a chip of v4, v5e, v5p, v6e, such as v5e:16x16, or GPUs such as a100:8" in stderr


@pytest.mark.parametrize("name", CARDS)
def test_targets(name):
    card, text = CARDS[name], target_config(CARDS[name], (12, 9))
    assert text.count("{") == text.count("}")
    assert f"core_count: {card.cores}" in text
    assert ("ACCELERATED_FEATURES" in text) == (card.capability >= (9, 0))
    # Peaks of NVIDIA's data sheets, TFLOP/s, and what JAX's pool leaves of the memory, GiB.
    flops, pool = {
        "a100": (312, 59), "a100-40gb": (312, 29), "h100": (989, 59), "h200": (989, 105), "b200": (2250, 133),
    }[name]  # fmt: skip
    assert (card.flops / 1e12, card.hbm // 2**30) == (flops, pool)
    bounds = card.bounds(card.flops, card.bandwidth, card.nvlink, 2 * card.network)
    assert [*bounds.values()] == pytest.approx([1, 1, 1, 2])


def test_a_missing_part_of_the_compiler_is_named(monkeypatch, tmp_path):
    found = {}
    monkeypatch.setattr(environment, "_folder", found.get)
    with pytest.raises(MissingExtraError, match=r"JAX's plugin for CUDA \(jax-cuda12-pjrt .*0\.2 GB.*\[gpu-compile\]"):
        environment.find_cuda_compiler()
    found["jax_plugins.xla_cuda12"] = tmp_path
    with pytest.raises(MissingExtraError, match=r"assembler for CUDA 12 \(nvidia-cuda-nvcc-cu12, about 0\.1 GB\)"):
        environment.find_cuda_compiler()
    found["nvidia.cuda_nvcc"] = tmp_path
    with pytest.raises(MissingExtraError, match="assembler for CUDA 12"):
        environment.find_cuda_compiler()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ptxas").touch()
    (tmp_path / "nvvm/libdevice").mkdir(parents=True)
    assert environment.find_cuda_compiler() == ((12, 9), tmp_path)
    flags = {"XLA_FLAGS": "--mine", "PATH": "/bin"}
    with mock.patch.dict(os.environ, flags):
        environment.prepare(gpus=True)
        assert os.environ["XLA_FLAGS"] == f"--mine --xla_gpu_cuda_data_dir={tmp_path}"
        assert os.environ["PATH"] == f"{tmp_path}/bin{os.pathsep}/bin"


def test_cudnn_cannot_be_compiled():
    from mpdit_jax.compile.measure import measure
    from mpdit_jax.config import base_config

    config = base_config()
    config.model.attention, config.model.dtype = "cudnn", "bfloat16"
    with pytest.raises(ConfigError, match="attention='cudnn' needs cuDNN's library and an NVIDIA GPU to compile"):
        measure(config)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="no compiler for GPUs: pip install -e '.[test,gpu-compile]'"
)


def compiled(topology, *fields):
    """Compile the train step of a small latent model and return the report."""
    arguments = [
        f"--config={ROOT / 'configs/mpdit_b_256.py'}", f"--topology={topology}", "--format=json", "--no_sampler",
        "--config.batch_size=64", "--config.model.preset=", "--config.model.hidden_size=256",
        "--config.model.num_heads=4", "--config.model.depths=2,2", *fields,
    ]  # fmt: skip
    status, stdout, stderr = run(
        "compile", arguments, extra={**OPTIMIZED, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    )
    assert status == 0, stderr
    return json.loads(stdout)["step"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["a100:8", "h100:8"])
def test_a_step_on_one_host(topology):
    """Collectives are the gradients' sums alone, and run beside products; nothing crosses a network."""
    step = compiled(topology)
    assert step["fits"]
    assert 0.97 < step["compiled_flops"] / step["flops"] <= 1.03
    assert {kind for kind, size in step["collectives"].items() if size} == {"all-reduce"}
    assert step["waited_for"] == 0 < step["overlapped"]
    assert step["crossed"] == 0 < step["sent"]


@needs_compiler
@pytest.mark.slow
def test_a_step_on_two_hosts():
    """The split state is gathered inside a host; the gradients' parts alone go between hosts."""
    step = compiled("a100:2x4", "--config.mesh.data=-1", "--config.mesh.fsdp=4")
    gradients = 4 * step["arguments"] / 4  # a quarter of the state on each GPU, of which the parameters are a quarter
    assert step["collectives"]["all-gather"] > 0
    assert 0 < step["crossed"] < gradients
    assert step["sent"] > step["crossed"]


def test_one_folder_of_a_namespace():
    assert environment._folder("no_such_module_here.inner") is None
    assert environment._folder("mpdit_jax.compile") == Path(environment.__file__).parent


@pytest.mark.parametrize(("topology", "slices"), [("a100:8", 2), ("v5e:2x2", 0), ("", 2)])
def test_slices_are_of_tpus(topology, slices):
    from mpdit_jax.compile.measure import measure
    from mpdit_jax.config import base_config

    with pytest.raises(ConfigError, match=f"--slices={slices}: expected 1 or more, of a TPU's --topology"):
        measure(base_config(), topology=topology, slices=slices)
