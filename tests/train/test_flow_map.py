"""Training a flow map: its loss, the step on one and several devices, starting from a flow model, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import mpdit_jax as mp
from mpdit_jax.checkpoint.load import load_checkpoint
from mpdit_jax.config import base_config, model_config, resolve
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import ConfigError, WeightsError
from mpdit_jax.flow.flow_map import FlowMapLoss, draw_jumps
from mpdit_jax.flow.objective import flow_matching_loss
from mpdit_jax.model.parameters import abstract, split
from mpdit_jax.train.__main__ import main
from mpdit_jax.train.init_from import initialize_from
from mpdit_jax.train.metric_window import window_means
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state, create_state
from mpdit_jax.train.step import config_loss, make_noising
from tests.flow.toys import tiny_model
from tests.tiny import TWO_LEVELS, saved_arrays, start_joined, train_arguments
from tests.train.test_sharding import run_script
from tests.train.test_step import prepare, small_config

MAP = ["--config.objective=flow_map", *TWO_LEVELS]


def map_config(guidance_max=1.0, **optimizer):
    config = base_config().copy_and_resolve_references()
    config.update(small_config(**optimizer).to_dict() | {"objective": "flow_map"})
    with config.model.ignore_type():
        config.model.update(flow_map=None, guidance_max=guidance_max)
    return resolve(config)


def test_jumps_go_back_in_time():
    times = np.asarray(draw_jumps(jax.random.key(0), 10_000))
    assert (times[:, 0] >= times[:, 1]).all()
    assert times.min() > 0
    assert times.max() < 1
    # The larger and the smaller of sigmoid(N(0.4, 1)) and sigmoid(N(-1.2, 1)), by another generator.
    random = np.random.default_rng(0)
    drawn = 1 / (1 + np.exp(-random.normal([0.4, -1.2], 1.0, (1_000_000, 2))))
    np.testing.assert_allclose(times.mean(axis=0), [drawn.max(axis=1).mean(), drawn.min(axis=1).mean()], atol=0.01)


class QuadraticMap(nnx.Module):
    """u(z, t, r, w) = a z + b t² + c r + 0.1 y w, whose derivative is known: a v + 2 b t."""

    input_shape, num_classes = (2, 2, 1), 3

    def __init__(self):
        self.a, self.b, self.c = nnx.Param(jnp.float32(0.5)), nnx.Param(jnp.float32(-0.3)), nnx.Param(jnp.float32(0.2))

    def __call__(self, z, t, y, r=None, w=None):
        r = t if r is None else r
        shift = self.b[...] * t**2 + self.c[...] * r + 0.1 * y * (1 if w is None else w)
        return self.a[...] * z + shift[:, None, None, None]


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [0.0, 0.6, "input"])
def test_the_loss_is_the_equation(p, guidance):
    """The loss equals a NumPy version: even rows are jumps, odd rows velocities, guided up to t = 0.7.

    With the scale w as an input, g is 1 - 1/w of the row.
    """
    random = np.random.default_rng(0)
    x, noise = random.standard_normal((2, 6, 2, 2, 1)).astype(np.float32)
    t = np.array([0.9, 0.9, 0.5, 0.5, 0.3, 0.2], np.float32)
    r = np.where(np.arange(6) % 2, t, t / 3).astype(np.float32)
    y = np.array([0, 1, 2, 0, 1, 2], np.int32)
    scales, w = np.linspace(1, 4, 6, dtype=np.float32), None
    if guidance == "input":
        loss, errors, metrics = FlowMapLoss(p)(QuadraticMap(), x, y, t, r, noise, scales)
        w = scales[:, None, None, None].astype(np.float64)
    else:
        loss, errors, metrics = FlowMapLoss(p, guidance)(QuadraticMap(), x, y, t, r, noise)
    wide = [value[:, None, None, None].astype(np.float64) for value in (t, r, y)]
    tw, rw, yw = wide
    z, v = (1 - tw) * x + tw * noise, noise - x
    v = v + (guidance if w is None else 1 - 1 / w) * (tw <= 0.7) * 0.1 * (yw - 3) * (1 if w is None else w)
    derivative = 0.5 * v - 0.6 * tw
    u = 0.5 * z - 0.3 * tw**2 + 0.2 * rw + 0.1 * yw * (1 if w is None else w)
    expected = ((u - (v - (tw - rw) * derivative)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(errors, expected, rtol=1e-5)
    np.testing.assert_allclose(loss, (expected / (expected + 1e-3) ** p).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["jump_error"], expected[::2].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["flow_error"], expected[1::2].mean(), rtol=1e-5)
    rms = np.sqrt((derivative[::2] ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(metrics["time_derivative"], rms.mean(), rtol=1e-5)


@pytest.mark.slow
def test_no_gradient_passes_through_the_target():
    """The gradient at p = 0 is that of squared errors against a fixed target."""
    x, noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8, 1)).astype(np.float32)
    t, y = np.array([0.9, 0.8, 0.5, 0.4], np.float32), np.arange(4)
    r = np.where(np.arange(4) % 2, t, t / 2).astype(np.float32)
    model = tiny_model(patch_sizes=(4, 2), depths=(1, 1), flow_map=True)

    def value(model):
        return FlowMapLoss(p=0.0)(model, x, y, t, r, noise)[0]

    z = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noise
    v = noise - x
    _, derivative = jax.jvp(lambda z, t: model(z, t, y, r), (z, t), (v, np.ones_like(t)))
    target = v - (t - r)[:, None, None, None] * derivative

    def fixed(model):
        return jnp.square(model(z, t, y, r) - target).mean()

    expected, found = split(nnx.grad(fixed)(model))[1], split(nnx.grad(value)(model))[1]
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max() + 1e-8)


def test_at_r_equal_t_the_loss_is_flow_matching():
    x, noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8, 1)).astype(np.float32)
    t, y = np.array([0.9, 0.8, 0.5, 0.4], np.float32), np.arange(4)
    model = tiny_model(patch_sizes=(4, 2), depths=(1, 1))
    loss, errors, _ = FlowMapLoss(p=0.0)(model, x, y, t, t, noise)
    expected, per_example = flow_matching_loss(model, x, y, t=t, noise=noise)
    np.testing.assert_allclose(errors, per_example, rtol=1e-5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_half_of_the_batch_jumps_and_the_rest_is_the_flow_models():
    """The odd rows of a flow map's batch are the same bits as in flow matching."""
    batch = {"x": jnp.zeros((8, 4, 4, 1)), "y": jnp.arange(8, dtype=jnp.int32) % 3}
    mapped, plain = (make_noising(config)(batch, jax.random.key(0)) for config in (map_config(), small_config()))
    assert plain.r is None
    np.testing.assert_array_equal(mapped.t[1::2], plain.t[1::2])
    np.testing.assert_array_equal(mapped.r[1::2], plain.t[1::2])
    assert (mapped.r[::2] < mapped.t[::2]).all()
    for name in ("x", "y", "noise"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(plain, name))
    assert mapped.w is None


@pytest.mark.slow
def test_guidance_scales_are_drawn_and_their_embedding_is_trained():
    """Scales are uniform in log w, everything else is drawn as without them, and the new weights leave zero."""
    config = map_config(guidance_max=4.0)
    state, step, batch = prepare(config, loss=config_loss(config, abstract(model_config(config))[0]))
    key = jax.random.key(0)
    many = {"x": jnp.zeros((2000, 4, 4, 1)), "y": jnp.zeros(2000, jnp.int32)}
    scaled, plain = (make_noising(one)(many, key) for one in (config, map_config()))
    logs = np.log(scaled.w) / np.log(4.0)
    assert logs.min() >= 0
    assert logs.max() <= 1
    np.testing.assert_allclose(np.quantile(logs, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.04)
    for name in ("t", "r", "y", "noise"):
        np.testing.assert_array_equal(getattr(scaled, name), getattr(plain, name))
    for _ in range(3):  # modulation and final layer start at zero as well
        state = step(state, batch)
    assert np.abs(state.parameters["guidance_embedding.linear.kernel"]).max() > 0
    assert window_means(jax.device_get(state.window))["jump_error"] > 0


@pytest.mark.slow
def test_accumulation_keeps_pairs_together():
    def trained(parts):
        config = map_config(eps=1e-4)
        structure = abstract(model_config(config))[0]
        state, step, batch = prepare(config, loss=config_loss(config, structure), accumulation=parts)
        for _ in range(5):
            state = step(state, batch)
        return state

    whole, parts = trained(1), trained(2)
    for name, array in whole.parameters.items():
        np.testing.assert_allclose(parts.parameters[name], array, rtol=0, atol=1e-4 * np.abs(array).max() + 1e-7)
    expected, found = (window_means(jax.device_get(state.window)) for state in (whole, parts))
    assert found == pytest.approx(expected, rel=1e-4)
    assert found["jump_error"] > 0
    assert found["time_derivative"] > 0


STEPS = """
import jax, json, numpy as np
from mpdit_jax.config import base_config, model_config, resolve
from mpdit_jax.distributed.mesh import local_rows, make_mesh, place_batch
from mpdit_jax.model.parameters import abstract
from mpdit_jax.train.metric_window import window_means
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state, create_state
from mpdit_jax.train.step import build_train_step, jit_step
random = np.random.default_rng(0)
batch = {"x": random.standard_normal((32, 8, 8, 4), np.float32), "y": random.integers(0, 10, 32, np.int32)}
small = {"patch_sizes": (4, 2), "depths": (2, 1), "hidden_size": 64, "num_heads": 2, "remat": "full"}
small |= {"input_size": (8, 8), "in_channels": 4, "num_classes": 10, "class_tokens": 2}
for dtype, count, shape in CASES:
    config = base_config()
    config.batch_size, config.objective, config.optimizer.eps = 32, "flow_map", 1e-4
    config.model.update({**small, "dtype": dtype})
    config = resolve(config)
    mesh = make_mesh(devices=jax.devices()[:count], **shape)
    model, optimizer = model_config(config), make_optimizer(config.optimizer)
    with jax.set_mesh(mesh):
        target = abstract_state(model, optimizer, mesh)
        state = create_state(model, optimizer, target, 0)
        step = jit_step(build_train_step(config, abstract(model)[0], optimizer), target, mesh)
        for _ in range(3):
            rows = local_rows(32, mesh)
            state = step(state, place_batch({name: array[rows] for name, array in batch.items()}, rows, 32, mesh))
    print(json.dumps(window_means(jax.device_get(state.window))))
"""


ALLOWED = {"float32": 1e-4, "bfloat16": 3e-2}  # relative difference of the sums, by the dtype of the products


def steps_script(*cases):
    """The script for cases of (dtype, devices, shape of the mesh)."""
    return STEPS.replace("CASES", repr(cases))


@pytest.fixture(scope="module")
def of_one_device():
    script = steps_script(*((dtype, 1, {}) for dtype in ALLOWED))
    return dict(zip(ALLOWED, map(json.loads, run_script(script).splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ALLOWED)
def test_eight_devices_take_the_steps_of_one(of_one_device, dtype):
    """The step combines forward derivative, scan, remat, FFT and FSDP."""
    found = json.loads(run_script(steps_script((dtype, 8, {"data": 2, "fsdp": 4}))))
    assert found == pytest.approx(of_one_device[dtype], rel=ALLOWED[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ALLOWED)
def test_two_processes_take_the_steps_of_one_device(of_one_device, dtype):
    """Each process holds half of the state and of the batch."""
    joined = start_joined(steps_script((dtype, 2, {"data": 1, "fsdp": 2})))
    outputs = [process.communicate(timeout=400) for process in joined]
    for process, (stdout, stderr) in zip(joined, outputs, strict=True):
        assert process.returncode == 0, stderr
        assert json.loads(stdout.splitlines()[-1]) == pytest.approx(of_one_device[dtype], rel=ALLOWED[dtype])


@pytest.fixture(scope="module")
def flow_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("flow") / "run"
    assert main(train_arguments(workdir, *TWO_LEVELS)) == 0
    return workdir


@pytest.mark.slow
def test_a_flow_model_goes_on_as_a_map_and_back(flow_run, tmp_path, capsys):
    workdir = tmp_path / "map"
    start = [f"--config.init_from={flow_run}", *MAP]
    assert main(train_arguments(workdir, *start, "--config.steps=1", "--config.optimizer.learning_rate=1e-30")) == 0
    flow, mapped = load_checkpoint(flow_run), load_checkpoint(workdir)
    assert mapped.config == dataclasses.replace(flow.config, flow_map=True)
    for name, array in split(flow)[1].items():
        np.testing.assert_allclose(split(mapped)[1][name], array, rtol=1e-6, atol=1e-8, err_msg=name)
    back = tmp_path / "back"
    assert main(train_arguments(back, f"--config.init_from={workdir}", *TWO_LEVELS)) == 0
    assert not load_checkpoint(back).config.flow_map


@pytest.mark.slow
def test_a_flow_model_starts_a_map_that_takes_the_guidance_scale(flow_run):
    """The embedding of the scale, which the flow model lacks, starts at zero; any other missing name is refused."""
    flow = load_checkpoint(flow_run)
    config, mesh = flow.config.replace(flow_map=True, guidance_max=4.0), make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer(map_config().optimizer)
    with jax.set_mesh(mesh):
        fresh = create_state(config, optimizer, abstract_state(config, optimizer, mesh), 0)
        state = initialize_from(fresh, str(flow_run), config)
    for parameters in (state.parameters, state.ema_parameters):
        for name, leaf in split(flow)[1].items():
            np.testing.assert_array_equal(parameters[name], leaf)
        assert not parameters["guidance_embedding.linear.kernel"].any()
        assert not parameters["guidance_embedding.linear.bias"].any()
    more = dataclasses.replace(fresh, parameters=fresh.parameters | {"other": jnp.ones(2)})
    with pytest.raises(ConfigError, match=r"has another model than config.model: other is no such parameter there"):
        initialize_from(more, str(flow_run), config)


@pytest.mark.slow
def test_a_map_resumes_to_the_same_bits_and_logs_its_errors(flow_run, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [f"--config.init_from={flow_run}", *MAP, "--config.log.every=2"]
    assert main(train_arguments(whole, *arguments, "--config.steps=8")) == 0
    for steps in (4, 8):
        assert main(train_arguments(parts, *arguments, f"--config.steps={steps}")) == 0
    expected, found = saved_arrays(whole, 8), saved_arrays(parts, 8)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(line["jump_error"] > 0 and line["flow_error"] > 0 and line["time_derivative"] > 0 for line in lines)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--config.batch_size=7"], "config.batch_size=7: expected an even number of examples in each part"),
    (["--config.model.patch_sizes=2,", "--config.model.depths=1,"], "a flow map needs two blocks"),
    (["--config.flow_map.guidance=0.5", "--config.label_dropout=0.0"], "expected 0 without label_dropout"),
    (["--config.flow_map.guidance=1.0"], "config.flow_map.guidance=1.0: expected at least 0 and below 1"),
    (["--config.flow_map.start_times=0.4,0.0"], "expected mean and std of a logit"),
    (["--config.model.attention=cudnn"], "config.model.attention='cudnn': expected 'xla'"),
    (["--config.model.flow_map=False"], "leave it out, config.objective decides it"),
    (["--config.model.guidance_max=4", "--config.flow_map.guidance=0.5"], "0 with model.guidance_max: give one"),
    (["--config.model.guidance_max=4", "--config.objective=flow_matching"], "only objective='flow_map' has the scale"),
    (["--config.model.guidance_max=4", "--config.label_dropout=0"], "1 without label_dropout: no null class"),
    (["--config.model.guidance_max=1.5"], "sample.guidance_scale=2.0: expected scales from 1 to model.guidance_max"),
    (["--config.trunk_drop=0.1"], "config.trunk_drop=0.1: expected 0 with objective='flow_map'"),
    (["--config.init_from=/nowhere"], "config.init_from=/nowhere: expected the workdir of a run, or a file of"),
])  # fmt: skip
def test_bad_configs(tmp_path, arguments, sentence):
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")):
        main(train_arguments(tmp_path / "run", *MAP, *arguments))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_other_classes_have_new_embeddings_and_the_rest_is_taken(flow_run, capsys):
    source = load_checkpoint(flow_run)
    model = dataclasses.replace(source.config, num_classes=4)
    optimizer, mesh = make_optimizer(resolve(base_config()).optimizer), make_mesh(devices=jax.devices()[:1])
    drawn = create_state(model, optimizer, abstract_state(model, optimizer, mesh), 0)
    state = initialize_from(drawn, str(flow_run), model)
    table = "class_embedding.table"
    for name, array in split(source)[1].items():
        if name == table:
            array = np.concatenate([drawn.parameters[table][:-1], array[-1:]])
        np.testing.assert_array_equal(state.parameters[name], array, err_msg=name)
        np.testing.assert_array_equal(state.ema_parameters[name], array, err_msg=name)
    assert "has 10 classes, and this run 4: the class embeddings are drawn anew" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_of_another_model_are_refused(flow_run, tmp_path):
    with pytest.raises(ConfigError, match=r"has another model than config.model: .* there and .* here"):
        main(train_arguments(tmp_path / "run", f"--config.init_from={flow_run}", *MAP, "--config.model.hidden_size=32"))


def test_weights_that_need_more_arguments_are_to_be_converted_first(flow_run, tmp_path):
    """Shapes do not show the number of heads, which only `convert` can be told."""
    file = tmp_path / "published.safetensors"
    safetensors.numpy.save_file(mp.to_torch(load_checkpoint(flow_run)), file)
    with pytest.raises(
        WeightsError, match=r"pass num_heads=…\. If that needs .* `python -m mpdit_jax\.convert --source=.*pub"
    ):
        main(train_arguments(tmp_path / "run", f"--config.init_from={file}", *TWO_LEVELS))
