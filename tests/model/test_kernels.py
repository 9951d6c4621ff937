"""Each platform's arithmetic gives the same values."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.errors import ConfigError, DeviceWarning
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.kernels import AllHeads, HeadByHead, attention_kernel, product_dtype
from tests.conftest import relative_error
from tests.flow.toys import tiny_model

QKV = np.random.default_rng(0).normal(size=(3, 10, 3, 4, 8)).astype(np.float32)  # (B, T, 3, heads, d)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_attention_head_by_head_is_attention(dtype, bound):
    kernels = AllHeads("xla"), HeadByHead(dtype)
    weights = jnp.cos(jnp.arange(3 * 10 * 4 * 8.0).reshape(3, 10, 4, 8))
    (y, dy), (z, dz) = (jax.value_and_grad(lambda x, k=k: (k(x) * weights).sum())(QKV * 3) for k in kernels)
    assert abs(y - z) <= bound * np.abs(weights).sum()
    assert relative_error(dz, dy) < bound
    assert relative_error(kernels[1](QKV * 3), kernels[0](QKV * 3)) < bound


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [64, 256])
@pytest.mark.parametrize("width", [64, 72])
def test_cudnn_attention_agrees_with_xla(tokens, width):
    """In bfloat16, because cuDNN has no float32 kernels, with the head sizes of the published models."""
    qkv = jax.random.normal(jax.random.key(0), (2, tokens, 3, 4, width), jnp.bfloat16)
    weights = jnp.cos(jnp.arange(2 * tokens * 4 * width, dtype=jnp.float32).reshape(2, tokens, 4, width))
    kernels = AllHeads("cudnn"), AllHeads("xla")
    for seen in (lambda x, k: k(x), jax.grad(lambda x, k: (k(x) * weights).sum())):
        found, expected = (seen(qkv, kernel).astype(jnp.float32) for kernel in kernels)
        assert relative_error(found, expected) < 2e-2


def test_large_logits_do_not_overflow():
    found, expected = HeadByHead("float32")(QKV * 100), AllHeads("xla")(QKV * 100)
    assert np.isfinite(found).all()
    assert relative_error(found, expected) < 1e-5


def test_kernels_are_chosen_by_platform(monkeypatch):
    assert attention_kernel(ModelConfig(platform="cpu", dtype="bfloat16")) == HeadByHead("bfloat16")
    assert attention_kernel(ModelConfig(platform="gpu")) == attention_kernel(ModelConfig(platform="tpu"))
    assert attention_kernel(ModelConfig(platform="tpu")) == AllHeads("xla")
    assert (product_dtype("cpu"), product_dtype("gpu"), product_dtype("tpu")) == (jnp.float32, None, None)
    here = attention_kernel(ModelConfig())
    assert here == attention_kernel(ModelConfig(platform=jax.default_backend()))
    with pytest.raises(ConfigError, match=r"model\.platform='cuda'.*auto, cpu, gpu, tpu"):
        ModelConfig(platform="cuda")


@pytest.mark.parametrize(("card", "fields", "obstacle"), [
    ("NVIDIA A100 cuda 8.0", {}, ""),
    ("NVIDIA H100 cuda 9.0", {"hidden_size": 1152, "num_heads": 16}, ""),
    ("NVIDIA A100 cuda 8.0", {"dtype": "float32"}, "an NVIDIA GPU and bfloat16, and this is float32 on gpu"),
    ("Tesla V100 cuda 7.0", {}, "a GPU of the Ampere generation or later, and this is Tesla V100"),
    ("AMD MI300X rocm 9.4", {}, "an NVIDIA GPU, and this is AMD MI300X"),
    ("NVIDIA A100 cuda 8.0", {"hidden_size": 48}, "a multiple of 8, at most 128, and this model's is 4"),
    ("NVIDIA A100 cuda 8.0", {"num_heads": 4}, "a multiple of 8, at most 128, and this model's is 192"),
])  # fmt: skip
def test_cudnn_attention_is_used_where_it_can_run(monkeypatch, recwarn, card, fields, obstacle):
    *kind, platform, capability = card.split()
    client = SimpleNamespace(platform_version=f"{platform} 12090")
    device = SimpleNamespace(device_kind=" ".join(kind), compute_capability=capability, client=client)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    kernel = attention_kernel(ModelConfig(**{"attention": "cudnn", "dtype": "bfloat16"} | fields))
    assert kernel == AllHeads("xla" if obstacle else "cudnn")
    assert [obstacle in str(one.message) for one in recwarn.list] == [True] * bool(obstacle)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a machine without a GPU")
@pytest.mark.parametrize("platform", ["auto", "gpu"])
def test_a_model_made_for_cudnn_computes_on_a_cpu(platform):
    model = tiny_model(dtype="bfloat16")
    x, t, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([0.2, 0.7]), jnp.array([1, 4])
    with pytest.warns(DeviceWarning, match="'cudnn' needs an NVIDIA GPU and bfloat16, and this is bfloat16 on cpu"):
        same = tiny_model(dtype="bfloat16", attention="cudnn", platform=platform)
    assert relative_error(same(x, t, y), model(x, t, y)) < 2e-2


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_model_for_another_platform_is_the_same_model(dtype, bound):
    model = tiny_model(dtype=dtype)
    x, t, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([0.2, 0.7]), jnp.array([1, 4])
    cpu, gpu = (model.for_platform(platform) for platform in ("cpu", "gpu"))
    programs = [str(jax.make_jaxpr(lambda x, m=m: m(x, t, y))(x)) for m in (cpu, gpu)]
    assert relative_error(cpu(x, t, y), gpu(x, t, y)) < bound
    # The accelerator's program has one loop over the blocks of each level, and no loop over heads.
    loops = [program.count(" scan[") for program in programs]
    assert loops[0] > loops[1] == len(model.config.depths)
    assert mp.count(cpu) == mp.count(gpu)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_wide_operands_ask_for_high_precision(dtype):
    """With high precision, GPUs compute products of a bfloat16 and a float32 operand without tensor cores."""
    model = tiny_model(dtype=dtype, platform="gpu", upsampler="conv_transpose")
    graph = jax.grad(lambda x: model(x, jnp.full(2, 0.3), jnp.arange(2)).astype(jnp.float32).sum())
    text = jax.jit(graph).lower(jnp.zeros((2, *model.config.input_size, model.config.in_channels))).as_text()
    products = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", line)]
    assert any("convolution" in line for line in products)
    narrow = ["bf16>" in re.search(r": \((.*)\) ->", line)[1] for line in products]
    assert any(narrow) == (dtype == "bfloat16")
    assert [line for line, is_narrow in zip(products, narrow, strict=True) if ("HIGHEST" in line) == is_narrow] == []
