"""The parser of compiled programs: how often instructions run, traffic, and the operations of products."""

import jax
import jax.numpy as jnp
import pytest

from mpdit_jax.compile.collectives import KINDS, Traffic, traffic
from mpdit_jax.compile.flops import product_flops, product_flops_by_library
from mpdit_jax.compile.hlo import dimensions, sizes, walk
from mpdit_jax.errors import ConfigError

# Text in libtpu's style: a loop that gathers in a ring, two steps per iteration, and an asynchronous all-gather that is
# repeated in every fusion beside it.
TPU = """HloModule step

%condition (p: (bf16[72,96], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8), metadata={op_name="x"}
  %p = (bf16[72,96]{1,0}, u32[]{:T(128)}) parameter(0)
  %index = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[]{:T(512)} compare(%index, %limit), direction=LT
}

%ring (p: (bf16[72,96], u32[])) -> (bf16[72,96], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %fifteen = u32[]{:T(128)} constant(15)
  %p.1 = (bf16[72,96]{1,0}, u32[]{:T(128)}) parameter(0)
  %part = bf16[72,96]{1,0} get-tuple-element(%p.1), index=0
  %index.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  %sent = (bf16[72,96]{1,0}, bf16[72,96]{1,0}, u32[], u32[]) collective-permute-start(%part), channel_id=1
  %got = bf16[72,96]{1,0} collective-permute-done(%sent)
  %next = u32[]{:T(128)} add(%index.1, %two)
  ROOT %result = (bf16[72,96]{1,0}, u32[]{:T(128)}) tuple(%got, %next)
}

%starts (x: bf16[10,8]) -> bf16[160,8] {
  %x.1 = bf16[10,8]{1,0} parameter(0)
  ROOT %gather.1 = bf16[160,8]{1,0} all-gather(%x.1), channel_id=7, dimensions={0}
}

%async_collective_fusion.3 (x: bf16[10,8], y: bf16[4,8]) -> bf16[4,4] {
  %x.2 = bf16[10,8]{1,0} parameter(0)
  %y.2 = bf16[4,8]{1,0} parameter(1)
  %gather.2 = bf16[160,8]{1,0} all-gather(%x.2), channel_id=7, dimensions={0}
  ROOT %product = bf16[4,4]{1,0} convolution(%y.2, %y.2), dim_labels=bf_oi->bf
}

%ends (x: bf16[10,8]) -> bf16[160,8] {
  %x.3 = bf16[10,8]{1,0} parameter(0)
  ROOT %gather.3 = bf16[160,8]{1,0} all-gather(%x.3), channel_id=7, dimensions={0}
}

ENTRY %main (x: bf16[10,8], y: bf16[4,8], z: (bf16[72,96], u32[])) -> bf16[160,8] {
  %x = bf16[10,8]{1,0} parameter(0)
  %y = bf16[4,8]{1,0} parameter(1)
  %z = (bf16[72,96]{1,0}, u32[]{:T(128)}) parameter(2)
  %loop = (bf16[72,96]{1,0}, u32[]{:T(128)}) while(%z), condition=%condition, body=%ring
  %async-collective-start = bf16[160,8]{1,0} fusion(%x), kind=kCustom, calls=%starts
  %beside = bf16[4,4]{1,0} fusion(%x, %y), kind=kOutput, calls=%async_collective_fusion.3
  ROOT %async-collective-done = bf16[160,8]{1,0} fusion(%x), kind=kCustom, calls=%ends
}
"""


def test_a_tpu_ring_runs_as_often_as_its_index_steps():
    (permute,) = [visit for visit in walk(TPU) if visit.instruction.operation == "collective-permute-start"]
    assert permute.times == 4
    assert traffic(TPU, 16).by_kind["collective-permute"] == 4 * 72 * 96 * 2


def test_an_asynchronous_gather_counts_once():
    gathered, permuted = 160 * 8 * 2, 4 * 72 * 96 * 2
    expected = {**dict.fromkeys(KINDS, 0), "all-gather": gathered, "collective-permute": permuted}
    assert traffic(TPU, 16) == Traffic(expected, gathered * 15 / 16 + permuted, 0.0, 0, 0)
    assert product_flops(TPU) == 2 * 4 * 4 * 8


@pytest.mark.parametrize(("groups", "members"), [
    ("{{0,1,2},{3,4,5}}", 3), ("[4,16]<=[64]", 16), ("[16,4]<=[4,16]T(1,0)", 4), ("{}", 64),
    ("mesh['axis_0'=16,'axis_1'=4] {'axis_0'}", 16),
    ("mesh['axis_0'=16,'axis_1'=1,'axis_2'=4], device_ids=([4,16]T(1,0)) {'axis_2'}", 4),
    ("mesh['axis_0'=16,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", 32), ("mesh['a'=16,'b'=4] {'a':(2)4}", 4),
])  # fmt: skip
def test_groups_of_chips(groups, members):
    """Each chip of an all-reduce over n chips sends 2 (n - 1) / n of the array."""
    line = f"  ROOT %sum = f32[64]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    text = f"HloModule m\n\nENTRY %main (x: f32[64]) -> f32[64] {{\n{line}\n}}\n"
    assert traffic(text, 64).sent == pytest.approx(2 * 256 * (members - 1) / members)


@pytest.mark.parametrize(("groups", "near", "hosts"), [
    ("{{0,1,8,9},{2,3,10,11}}", 2, 2), ("[2,32]<=[64]", 8, 4), ("[8,8]<=[8,8]T(1,0)", 1, 8), ("{}", 8, 8),
    ("[16,4]<=[2,2,16]T(2,1,0)", 1, 4), ("mesh['data'=8,'fsdp'=8] {'fsdp'}", 8, 1),
    ("mesh['data'=8,'fsdp'=8] {'data'}", 1, 8), ("mesh['data'=16,'fsdp'=4] {'data'}", 2, 8),
    ("mesh['a'=8,'b'=8], device_ids=([8,8]T(1,0)) {'a'}", 8, 1), ("mesh['a'=64] {'a':(4)16}", 8, 2),
])  # fmt: skip
def test_traffic_between_hosts(groups, near, hosts):
    """Of 64 devices on 8 hosts. Devices of a host pass on what one of them has got from each other host."""
    line = f"  ROOT %sum = f32[64]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    moved = traffic(f"HloModule m\n\nENTRY %main (x: f32[64]) -> f32[64] {{\n{line}\n}}\n", 64, per_host=8)
    assert moved.sent == pytest.approx(2 * 256 * (near - 1) / near)
    assert moved.crossed == pytest.approx(2 * 256 * (hosts - 1) / (near * hosts))


# Text in the style of XLA's compiler for GPUs: products by cuBLAS, one of them in a loop, and by Triton.
GPU = """HloModule step

%gemm_fusion (a: bf16[4,8], b: bf16[8,2]) -> bf16[4,2] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,2]{1,0} parameter(1)
  ROOT %dot.1 = bf16[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (p: (bf16[16,6], bf16[6,10])) -> (bf16[16,6], bf16[6,10]) {
  %p = (bf16[16,6]{1,0}, bf16[6,10]{1,0}) parameter(0)
  %x = bf16[16,6]{1,0} get-tuple-element(%p), index=0
  %y = bf16[6,10]{1,0} get-tuple-element(%p), index=1
  %call = (bf16[16,10]{1,0}, s8[4194304]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  ROOT %again = (bf16[16,6]{1,0}, bf16[6,10]{1,0}) tuple(%x, %y)
}

ENTRY %main (a: bf16[4,8], b: bf16[8,2], z: (bf16[16,6], bf16[6,10])) -> bf16[4,2] {
  %a.1 = bf16[4,8]{1,0} parameter(0)
  %b.1 = bf16[8,2]{1,0} parameter(1)
  %z = (bf16[16,6]{1,0}, bf16[6,10]{1,0}) parameter(2)
  %loop = (bf16[16,6]{1,0}, bf16[6,10]{1,0}) while(%z), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %other = bf16[4,2]{1,0} custom-call(%a.1), custom_call_target="xla_ffi_python_gpu_callback"
  %started = bf16[4,2]{1,0} all-reduce-start(%other), replica_groups={{0,1}}, to_apply=%add, \
backend_config={"collective_backend_config":{"is_sync":false}}
  %ended = bf16[4,2]{1,0} all-reduce-done(%started)
  %waited = bf16[4,2]{1,0} all-reduce(%ended), replica_groups={{0,1}}, to_apply=%add, \
backend_config={"collective_backend_config":{"is_sync":true}}
  ROOT %fusion = bf16[4,2]{1,0} fusion(%a.1, %b.1), kind=kCustom, calls=%gemm_fusion, \
backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
}
"""


def test_a_gpus_products_and_collectives():
    assert product_flops_by_library(GPU) == {"cuBLAS": 2 * 3 * 16 * 10 * 6, "Triton": 2 * 4 * 2 * 8, "XLA": 0}
    moved = traffic(GPU, 2, per_host=8)
    assert (moved.overlapped, moved.waited_for, moved.by_kind["all-reduce"]) == (1, 1, 2 * 16)


def test_groups_of_another_kind_are_refused():
    line = "  ROOT %sum = f32[64]{0} all-reduce(%x), replica_groups=<new>, to_apply=%add"
    with pytest.raises(ConfigError, match="groups devices in a way that is not known here"):
        traffic(f"HloModule m\n\nENTRY %main (x: f32[64]) -> f32[64] {{\n{line}\n}}\n", 64)


def test_libtpus_reduce_scatter():
    """libtpu writes it as an all-reduce of which each chip slices a part."""
    text = """HloModule m

%all-reduce-scatter.3 (x: bf16[64,8]) -> bf16[4,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %sum = bf16[64,8]{1,0} all-reduce(%x), replica_groups=[1,16]<=[16], to_apply=%add
  ROOT %part = bf16[4,8]{1,0} dynamic-slice(%sum, %i, %j), dynamic_slice_sizes={4,8}
}

ENTRY %main (x: bf16[64,8]) -> bf16[4,8] {
  %x.1 = bf16[64,8]{1,0} parameter(0)
  ROOT %fusion = bf16[4,8]{1,0} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.3
}
"""
    moved = traffic(text, 16)
    assert (moved.by_kind["reduce-scatter"], moved.by_kind["all-reduce"]) == (1024, 0)
    assert moved.sent == 1024 * 15 / 16


def test_combined_collectives():
    """XLA lists the operands first, then the results."""
    lines = [
        "((bf16[4,8]{1,0}, bf16[2,8]{1,0}), (bf16[64,8]{1,0}, bf16[32,8]{1,0})) all-gather-start(%a, %b)",
        "((f32[6]{0}, f32[2]{0}), (f32[6]{0}, f32[2]{0}), u32[], u32[]) collective-permute-start(%c, %d)",
    ]
    body = "\n".join(f"  %line.{number} = {line}, replica_groups=[1,16]<=[16]" for number, line in enumerate(lines))
    moved = traffic(f"HloModule m\n\nENTRY %main (x: f32[6]) -> f32[6] {{\n{body}\n}}\n", 16).by_kind
    assert (moved["all-gather"], moved["collective-permute"]) == (96 * 8 * 2, 8 * 4)


def test_shapes():
    shape = "(bf16[64,2]{1,0:T(8,128)(2,1)}, f32[], pred[3]{0}, u4[6]{0})"
    assert dimensions(shape) == [(64, 2), (), (3,), (6,)]
    assert sizes(shape) == [256, 4, 3, 3]


@pytest.mark.parametrize(("window", "pairs"), [
    # Three windows of 2 with stride 2 over a row of 5; the last window has one entry.
    ("f32[5,2,3] f32[2,3,4] f32[3,2,4] size=2 stride=2 pad=0_1", 5),
    # libtpu's form of a product with a batch dimension of 16: each window has one entry.
    ("f32[16,2,3] f32[16,3,4] f32[16,2,4] size=16 stride=15 lhs_dilate=16", 16),
])  # fmt: skip
def test_only_entries_inside_a_window_count(window, pairs):
    image, kernel, result, *attributes = window.split(" ")
    text = f"""HloModule m

ENTRY %main (a: {image}, b: {kernel}) -> {result} {{
  %a = {image}{{2,1,0}} parameter(0)
  %b = {kernel}{{2,1,0}} parameter(1)
  ROOT %c = {result}{{2,1,0}} convolution(%a, %b), window={{{" ".join(attributes)}}}, dim_labels=0bf_0io->0bf
}}
"""
    assert product_flops(text) == 2 * pairs * 2 * 3 * 4


def test_real_loops_and_products():
    def loss(w, x):
        return (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0] ** 2).sum()

    w, x = jnp.ones((5, 32, 32)), jnp.ones((64, 32))
    text = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()
    # One forward and two backward products per layer; the scan also computes the unused gradient of the input.
    assert product_flops(text) == 2 * 3 * 5 * 64 * 32 * 32
