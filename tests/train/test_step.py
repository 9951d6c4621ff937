"""The step by itself: accumulation, steps left out, optimizers and schedules, donation."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import mpdit_jax as mp
from mpdit_jax.config import base_config, model_config, resolve
from mpdit_jax.data.latents import LatentSpace
from mpdit_jax.distributed.mesh import make_mesh, replicated
from mpdit_jax.model.masking import draw_kept
from mpdit_jax.model.parameters import abstract, split
from mpdit_jax.train.__main__ import main
from mpdit_jax.train.guard import NONFINITE_UPDATE
from mpdit_jax.train.metric_window import window_means
from mpdit_jax.train.optimizer import OPTIMIZERS, make_optimizer, make_schedule
from mpdit_jax.train.state import abstract_state, create_state
from mpdit_jax.train.step import (
    NoisyBatch,
    build_train_step,
    jit_step,
    make_loss,
    make_noising,
    make_step,
    sample_latents,
)
from tests.flow.toys import tiny_model
from tests.tiny import train_arguments


def small_config(**optimizer):
    config = base_config()
    config.batch_size = 8
    config.optimizer.update(optimizer)
    model = {"patch_sizes": (2, 1), "depths": (2, 1), "hidden_size": 16, "num_heads": 2, "input_size": (4, 4)}
    config.model.update(model | {"in_channels": 1, "num_classes": 3, "class_tokens": 1, "time_embedding": "sinusoidal"})
    return resolve(config)


def prepare(config, loss=None, **options):
    """The initial state, the jitted step and a batch."""
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer, (structure, _) = make_optimizer(config.optimizer), abstract(model_config(config))
    step = make_step(make_noising(config), loss or make_loss(structure), optimizer, 0.9, **options)
    target = abstract_state(model_config(config), optimizer, mesh)
    random = np.random.default_rng(0)
    batch = {"x": random.standard_normal((8, 4, 4, 1), np.float32), "y": random.integers(0, 3, 8, np.int32)}
    return create_state(model_config(config), optimizer, target, 0), jit_step(step, target, mesh), batch


def trained(steps, config, **options):
    state, step, batch = prepare(config, **options)
    for _ in range(steps):
        state = step(state, batch)
    return state


@pytest.mark.slow
def test_accumulation_is_the_whole_batch():
    # eps as in tests/tiny.py: Adam must not divide rounding by rounding.
    whole, parts = (trained(20, small_config(eps=1e-4), accumulation=count) for count in (1, 4))
    for name, array in whole.parameters.items():
        allowed = 1e-4 * np.abs(array).max()
        np.testing.assert_allclose(parts.parameters[name], array, rtol=0, atol=allowed, err_msg=name)
    expected, found = (window_means(jax.device_get(state.window)) for state in (whole, parts))
    assert found == pytest.approx(expected, rel=1e-5)
    assert len([name for name in found if name.startswith("loss_t")]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing(value):
    state, step, batch = prepare(small_config())
    state = step(state, batch)
    before = jax.device_get(state)
    broken = {**batch, "x": batch["x"].copy()}
    broken["x"][3, 1, 1] = value
    state = step(state, broken)
    after = jax.device_get(state)
    for field in ("parameters", "ema_parameters", "optimizer_state"):
        same = jax.tree.map(np.array_equal, getattr(before, field), getattr(after, field))
        assert all(jax.tree.leaves(same)), field
    assert (after.step, after.guard["skipped_in_a_row"], after.guard["accepted"]) == (2, 1, 1)
    assert window_means(after.window) == window_means(before.window) | {"skipped": 1.0}
    state = jax.device_get(step(state, batch))
    assert state.guard["skipped_in_a_row"] == 0
    assert state.window["skipped"] == 1


@pytest.mark.slow
def test_the_average_warms_up():
    """At step s the decay is (1 + s) / (10 + s), and 0.9 once that is larger; a skipped step averages nothing."""
    state, step, batch = prepare(small_config(), ema_warmup=True)
    name, broken = "final.bias", {**batch, "x": batch["x"] * np.nan}
    for number, decay in ((0, 0.1), (1, 2 / 11), (2, None), (3, 4 / 13), (80, 0.9), (10_000_000, 0.9)):
        state = dataclasses.replace(state, step=jnp.int32(number))
        before = np.asarray(state.ema_parameters[name], np.float64)
        state = step(state, broken if decay is None else batch)
        expected = before if decay is None else decay * before + (1 - decay) * np.asarray(state.parameters[name])
        np.testing.assert_allclose(state.ema_parameters[name], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [True, False])
def test_a_config_decides_whether_the_average_warms_up(warmup):
    config = ConfigDict(small_config())
    config.ema.warmup = warmup
    state, _, batch = prepare(config)
    step = build_train_step(config, abstract(model_config(config))[0], make_optimizer(config.optimizer))
    after = jax.jit(step)(state, batch)
    moved = np.abs(after.ema_parameters["final.bias"]).max() / np.abs(after.parameters["final.bias"]).max()
    assert moved == pytest.approx(0.9 if warmup else 1e-4, rel=1e-2)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_finite_gradient_gives_a_finite_update(name, clip_norm):
    """This is why a step can be judged before its update, with the usual eps and decays."""
    optimizer = make_optimizer(small_config(name=name, clip_norm=clip_norm).optimizer)
    parameters = {"levels.0.blocks.layers.mlp.inner.kernel": jnp.ones((2, 8, 8)), "final.bias": jnp.ones(8)}
    for scale in (0.0, 1e-45, 1e-30, 1e-19, 1.0, 1e18):  # the squares of the last still add up in float32
        state = optimizer.init(parameters)
        for sign in (1, -1, 0):
            gradients = jax.tree.map(lambda leaf, size=sign * scale: size * leaf.at[..., :4].set(0), parameters)
            updates, state = jax.jit(optimizer.update)(gradients, state, parameters)
            assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state))), (scale, sign)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [{"learning_rate": 1e38}, {"eps": 1e-45}])
def test_an_update_that_is_not_finite_is_the_end(optimizer):
    """The window remembers the update, whatever steps follow."""
    state, step, batch = prepare(small_config(**optimizer))
    for _ in range(3):
        state = step(state, batch)
        assert state.window["most_skipped_in_a_row"] >= NONFINITE_UPDATE
    assert window_means(jax.device_get(state.window)) == {"skipped": 2.0}  # the first was made


@pytest.mark.slow
def test_a_spike_is_left_out_once_the_norms_are_known():
    state, step, batch = prepare(small_config(), spike_factor=5.0)
    spike = {**batch, "x": batch["x"] * 100}
    assert step(jax.tree.map(jnp.copy, state), spike).guard["accepted"] == 1  # too early to tell
    warm = dataclasses.replace(
        state, guard={**state.guard, "accepted": jnp.int32(1000), "gradient_norm": jnp.float32(0.5)}
    )
    assert step(jax.tree.map(jnp.copy, warm), spike).guard["skipped_in_a_row"] == 1
    assert step(warm, batch).guard["skipped_in_a_row"] == 0


def test_schedules():
    cosine = make_schedule(small_config(
        learning_rate=1e-3, schedule="cosine", warmup_steps=10, decay_steps=100, end_learning_rate=1e-4
    ).optimizer)  # fmt: skip
    assert [float(cosine(step)) for step in (0, 5, 10, 60, 110, 500)] == pytest.approx(
        [0.0, 5e-4, 1e-3, 5.5e-4, 1e-4, 1e-4]
    )
    linear = make_schedule(small_config(learning_rate=1.0, schedule="linear", decay_steps=10).optimizer)
    assert [float(linear(step)) for step in (0, 5, 10, 11)] == pytest.approx([1.0, 0.5, 0.0, 0.0])


@pytest.mark.slow
def test_the_learning_rate_warms_up():
    state, step, batch = prepare(small_config(warmup_steps=10))
    start = jax.device_get(state.parameters)
    state = step(state, batch)
    assert all(np.array_equal(state.parameters[name], array) for name, array in start.items())  # a rate of 0
    state = step(state, batch)
    assert any(not np.array_equal(state.parameters[name], array) for name, array in start.items())


@pytest.mark.slow
def test_the_learning_rate_of_the_log_is_that_of_the_last_step(tmp_path):
    more = ["--config.optimizer.warmup_steps=8", "--config.log.every=1", "--config.steps=3"]
    assert main(train_arguments(tmp_path / "run", *more)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.0, 1e-3 / 8, 2e-3 / 8])
    assert lines[0]["update_norm"] == 0 < lines[1]["update_norm"]


@pytest.mark.slow
def test_clipping_bounds_what_the_optimizer_sees():
    """Adam's first moment after one step is (1 - b1) times the gradient, here of norm 1e-3."""
    state, step, batch = prepare(small_config(clip_norm=1e-3))
    state = step(state, batch)
    moments = state.optimizer_state[1][0].mu
    norm = np.sqrt(sum(float((np.asarray(leaf) ** 2).sum()) for leaf in jax.tree.leaves(moments)))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert jax.device_get(state.window)["gradient_norm"] > 0.1  # logged before it is cut


@pytest.mark.slow
def test_muon_heeds_eps():
    """Adam's eps applies to parameters that are no block's matrix: a large eps makes their updates tiny."""
    change = []
    for eps in (1e-8, 1e6):
        state, step, batch = prepare(small_config(name="muon", learning_rate=1e-2, weight_decay=0.0, eps=eps))
        before = np.array(state.parameters["final.kernel"])
        change.append(np.abs(np.asarray(step(state, batch).parameters["final.kernel"]) - before).max())
    assert change[1] < 1e-3 * change[0]


@pytest.mark.slow
def test_muon_turns_the_blocks_matrices():
    """Muon's updates have nearly equal singular values, and AdamW's do not."""
    spread = {}
    for name in ("muon", "adamw"):
        state, step, batch = prepare(small_config(name=name, learning_rate=1e-2, weight_decay=0.0))
        for _ in range(4):  # final layer and gates start at zero: blocks have a gradient from the third step on
            before = np.array(state.parameters["levels.0.blocks.layers.mlp.inner.kernel"])
            state = step(state, batch)
        change = np.asarray(state.parameters["levels.0.blocks.layers.mlp.inner.kernel"]) - before
        values = np.linalg.svd(change[0], compute_uv=False)
        spread[name] = values[0] / np.median(values)
    assert spread["muon"] < 1.6 < spread["adamw"]


def test_no_second_state_lies_beside_the_first():
    """A step takes three times the memory of the parameters: gradient, update and squares."""
    config, mesh, width = small_config(), make_mesh(devices=jax.devices()[:1]), 1024
    optimizer = make_optimizer(config.optimizer)

    def loss(parameters, examples):
        per_example = jnp.square(examples.x[:, 0, 0] @ parameters["kernel"]).mean(axis=-1)
        return per_example.mean(), (per_example, {})

    state = abstract_state(model_config(config), optimizer, mesh)
    kernel = jax.ShapeDtypeStruct((width, width), jnp.float32, sharding=replicated(mesh))
    state = dataclasses.replace(
        state,
        parameters={"kernel": kernel},
        ema_parameters={"kernel": kernel},
        optimizer_state=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
            jax.eval_shape(optimizer.init, {"kernel": kernel}),
        ),
    )
    batch = {
        "x": jax.ShapeDtypeStruct((8, 1, 1, width), jnp.float32),
        "y": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    with jax.set_mesh(mesh):
        compiled = jit_step(make_step(make_noising(config), loss, optimizer, 0.9), state, mesh).lower(state, batch)
    temporaries = compiled.compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 3.1 * 4 * width * width


@pytest.mark.slow
def test_the_state_is_updated_in_place():
    """The state is donated: every buffer is reused and none is copied."""
    config = small_config()
    state, step, batch = prepare(config)
    analysis = step.lower(state, batch).compile().memory_analysis()
    assert analysis.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.parameters)]
    after = step(state, batch)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.parameters)] == pointers
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.fixture
def strict():
    """JAX's strict rules, which users turn on to find mistakes of their own."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [
    {"time_embedding": "fno", "upsampler": "linear_conv"},
    {"platform": "gpu", "upsampler": "linear_mlp", "flow_map": True, "guidance_max": 4.0},
    {"condition": "vector", "modulation": "per_block", "class_tokens": 16, "upsampler": "conv_transpose"},
])  # fmt: skip
def test_strict_promotion(dtype, fields):
    """Loss, gradient and sampler can be traced under JAX's strict rules."""
    model, x, y, key = tiny_model(dtype=dtype, **fields), jnp.ones((2, 8, 8, 1)), jnp.arange(2), jax.random.key(0)
    jax.eval_shape(jax.grad(lambda x: mp.flow_matching_loss(model, x, y, key=key)[0]), x)
    for solver in ("heun", "dpmpp_2m"):
        jax.eval_shape(lambda key, solver=solver: mp.make_sampler(solver, 2, 1.5)(model, y, key), key)


@pytest.mark.usefixtures("strict")
def test_strict_promotion_of_a_step():
    state, step, batch = prepare(small_config(), spike_factor=2.0)
    jax.eval_shape(step, state, batch)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_promotion_of_the_losses(dtype):
    """Samples of latents, hidden tokens, and a trunk that is left out."""
    small = {"in_channels": 1, "input_size": 8, "depths": (3,), "patch_sizes": (2,), "decoder_depth": 1, "dtype": dtype}
    model, key = tiny_model(**small), jax.random.key(0)
    structure, parameters = split(model)
    moments = jnp.ones((2, 2, 8, 8, 1), jnp.float16)
    space = LatentSpace((0.5,), (2.0,), "")
    x = sample_latents(key, {"mean": moments, "std": moments}, space)
    noisy = NoisyBatch(x, jnp.arange(2), jnp.full(2, 0.5), x, kept=draw_kept(key, model.config, 0.5, 2))
    jax.eval_shape(jax.grad(make_loss(structure, 0.1), has_aux=True), parameters, noisy)
    model = tiny_model(dtype=dtype)
    structure, parameters = split(model)
    noisy = noisy._replace(kept=None, dropped=jnp.array([True, False]))
    jax.eval_shape(jax.grad(make_loss(structure), has_aux=True), parameters, noisy)
