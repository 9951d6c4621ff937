"""Training with the trunk dropped, and the tail alone: what it computes, what it costs, how it guides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.compile.flops import product_flops
from mpdit_jax.config import base_config, resolve
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.model.accounting import count_macs, tail_macs
from mpdit_jax.model.parameters import merge, split
from mpdit_jax.model.presets import preset_config
from mpdit_jax.model.trunk_drop import TailOnly, dropped_velocity
from mpdit_jax.train.step import make_loss, make_noising
from tests.flow.toys import tiny_model
from tests.sample.conftest import make_workdir, run
from tests.train.test_step import small_config


@pytest.fixture(scope="module")
def model():
    return tiny_model(patch_sizes=(4, 2), depths=(2, 1))


@pytest.fixture(scope="module")
def inputs():
    x = np.random.default_rng(1).standard_normal((4, 8, 8, 1), np.float32)
    return jnp.asarray(x), jnp.array([0.3, 0.8, 0.5, 0.6]), jnp.arange(4)


def test_dropped_examples_see_the_tail_alone(model, inputs):
    dropped = jnp.array([True, False, False, True])
    found = jax.jit(lambda *arrays: dropped_velocity(model, *arrays))(*inputs, dropped)
    whole, alone = model(*inputs), TailOnly(model)(*inputs)
    np.testing.assert_allclose(found, jnp.where(dropped[:, None, None, None], alone, whole), rtol=0, atol=1e-5)
    assert np.abs(whole - alone).max() > 0.01


def test_the_tail_does_not_depend_on_the_trunk(model, inputs):
    structure, parameters = split(model)
    trunk = ("levels.0.", "levels.1.upsample.")
    without = {name: jnp.nan * leaf if name.startswith(trunk) else leaf for name, leaf in parameters.items()}
    np.testing.assert_array_equal(TailOnly(merge(structure, without))(*inputs), TailOnly(model)(*inputs))


def test_the_tail_costs_what_is_counted():
    """The analytic count is that of the compiled products, and the shares are those of the docstring."""
    model = tiny_model(patch_sizes=(4, 2), depths=(3, 2), hidden_size=64, input_size=16, platform="gpu")
    shapes = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in (((8, 16, 16, 1), "f4"), ((8,), "f4"), ((8,), "i4"))]
    for called, expected in ((TailOnly(model), tail_macs(model.config)), (model, count_macs(model.config))):
        compiled = jax.jit(lambda *arrays, called=called: called(*arrays)).lower(*shapes).compile()
        assert product_flops(compiled.as_text()) == pytest.approx(2 * 8 * expected, rel=0.01)
    for name, share in {"mpdit_b": 0.77, "mpdit_l": 0.53, "mpdit_xl": 0.49}.items():
        assert tail_macs(preset_config(name)) / count_macs(preset_config(name)) == pytest.approx(share, abs=0.01)


def test_the_tail_guides(model):
    y, key = jnp.arange(3), jax.random.key(0)
    sampler = mp.make_sampler("euler", steps=2, guidance_scale=2.0)
    path = sampler.solve(model, y, key, guide=TailOnly(model), record=True).path
    better, worse = (called(path[0], jnp.ones(3), y) for called in (model, TailOnly(model)))
    np.testing.assert_allclose(path[1], path[0] - 0.5 * (worse + 2 * (better - worse)), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="TailOnly cannot be a flow map"):
        mp.make_sampler("flow_map", steps=2)(TailOnly(model), y, key)


def test_a_share_of_the_examples_is_dropped_and_nothing_else_is_drawn_otherwise():
    def config(share):
        changed = base_config().copy_and_resolve_references()
        changed.update(small_config().to_dict() | {"trunk_drop": share})
        return resolve(changed)

    batch = {"x": jnp.ones((4000, 4, 4, 1)), "y": jnp.zeros(4000, jnp.int32)}
    plain, drawn = (make_noising(config(share))(batch, jax.random.key(0)) for share in (0.0, 0.25))
    assert plain.dropped is None
    assert abs(drawn.dropped.mean() - 0.25) < 0.03
    for name in ("x", "y", "t", "noise"):
        np.testing.assert_array_equal(getattr(drawn, name), getattr(plain, name))


def test_the_loss_of_each_example_is_that_of_its_path(model, inputs):
    x, t, y = inputs
    noisy = make_noising(small_config())({"x": x, "y": y}, jax.random.key(0))._replace(y=y, t=t)
    structure, parameters = split(model)
    dropped = jnp.array([True, False, True, False])
    _, (found, _) = make_loss(structure)(parameters, noisy._replace(dropped=dropped))
    z = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noisy.noise
    for called, rows in ((TailOnly(model), dropped), (model, ~dropped)):
        errors = jnp.square(called(z, t, y) - (noisy.noise - x)).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(found[rows], errors[rows], rtol=1e-4)


def test_the_sample_command_guides_by_the_tail(tmp_path):
    workdir = make_workdir(tmp_path / "run")
    stored = workdir / "config.json"
    stored.write_text(stored.read_text().replace('"trunk_drop": 0.0', '"trunk_drop": 0.1'))
    arguments = ["--labels=3", "--num_samples=2", "--guidance_scale=2"]
    for name, more in (("plain", []), ("tail", ["--guide=tail"])):
        assert run(workdir, *arguments, f"--out={tmp_path / name}.npz", *more) == 0
    plain, tail = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("plain", "tail"))
    assert plain.shape == tail.shape
    assert (plain != tail).any()


@pytest.mark.parametrize("fields", [{"patch_sizes": (2,), "depths": (2,)}, {"patch_sizes": (2, 1), "skip": False}])
def test_a_model_whose_tail_cannot_work_alone_is_refused(fields):
    config = base_config()
    config.trunk_drop = 0.1
    config.model.update({"depths": (1, 1), "input_size": (4, 4), **fields})
    with pytest.raises(ConfigError, match=r"config.trunk_drop=0\.1: expected 0, or a model of two levels or more"):
        resolve(config)
    with pytest.raises(InputError, match="a tail works alone in a model of two levels or more"):
        TailOnly(tiny_model(**{"depths": (1, 1), **fields}))
