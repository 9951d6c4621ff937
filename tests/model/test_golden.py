"""The model, its gradients and its sampler against arrays computed by a PyTorch implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.flow.guidance import guided_field
from mpdit_jax.flow.objective import interpolate
from mpdit_jax.model.parameters import merge, split
from tests.conftest import Golden, relative_error

FORWARD = 2e-5
DERIVED = 2e-4


@pytest.fixture(scope="module")
def model(golden):
    return mp.load_torch(golden.group("state/"), num_heads=4)


def test_forward(golden, model):
    assert relative_error(model(golden.images("x"), golden["t"], golden["y"]), golden.images("out")) <= FORWARD


def test_null_class(golden, model):
    null = np.full_like(golden["y"], model.num_classes)
    assert relative_error(model(golden.images("x"), golden["t"], null), golden.images("out_null")) <= FORWARD


def test_guided(golden, model):
    labels, scale = jnp.asarray(golden["y"]), golden["cfg_scale"]
    t, x = golden["t"], golden.images("x")
    v_class, v_null = model(x, t, labels), model(x, t, jnp.full_like(labels, model.num_classes))
    assert relative_error(v_null + scale * (v_class - v_null), golden.images("out_cfg")) <= FORWARD
    field = guided_field(model, labels, jnp.full_like(labels, model.num_classes), scale)
    point = jax.tree.map(lambda leaf: leaf[0], field.prepare(t[None]))  # one time for each example
    assert relative_error(field(x, point), golden.images("out_cfg")) <= FORWARD


def test_time_embedding(golden, model):
    assert relative_error(model.time_embedding(golden["t"]), golden["t_embed"]) <= FORWARD


def test_path(golden):
    z, velocity = interpolate(golden.images("x"), golden.images("n"), golden["t"])
    assert relative_error(z, golden.images("zt")) <= FORWARD
    assert np.array_equal(velocity, golden.images("n") - golden.images("x"))


def test_loss(golden, model):
    loss, per_example = mp.flow_matching_loss(
        model, golden.images("x"), golden["y"], t=golden["t"], noise=golden.images("n")
    )
    assert relative_error(loss, golden["loss"]) <= DERIVED
    assert relative_error(per_example, golden["loss_per_example"]) <= DERIVED


def assert_golden_gradients(golden, model):
    structure, parameters = split(model)

    def loss(parameters):
        model, x, noise = merge(structure, parameters), golden.images("x"), golden.images("n")
        return mp.flow_matching_loss(model, x, golden["y"], t=golden["t"], noise=noise)[0]

    found = mp.to_torch(merge(structure, jax.jit(jax.grad(loss))(parameters)))
    expected = golden.group("grad/")
    assert len(expected) == len([name for name in found if not name.startswith("pos_embed")])
    for name, gradient in expected.items():
        assert np.abs(found[name] - gradient).max() <= DERIVED * np.abs(gradient).max(), name


def test_gradients(golden, model):
    assert_golden_gradients(golden, model)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_changes_no_gradient(remat):
    golden = Golden("mpdit_two_level_fno")
    assert_golden_gradients(golden, with_fields(mp.load_torch(golden.group("state/"), num_heads=4), remat=remat))


@pytest.mark.parametrize(("key", "scale"), [("euler", 1.0), ("euler_cfg", None)])
def test_euler(golden, model, key, scale):
    scale = float(golden["cfg_scale"]) if scale is None else scale
    sampler = mp.make_sampler(steps=int(golden["euler_points"]) - 1, guidance_scale=scale)
    z = sampler(model, golden["y"], jax.random.key(0), noise=golden.images("n"))
    assert relative_error(z, golden.images(key)) <= DERIVED


def test_bfloat16_is_near_float32(golden, model):
    v = with_fields(model, dtype="bfloat16")(golden.images("x"), golden["t"], golden["y"])
    assert v.dtype == jnp.float32
    error = relative_error(v, golden.images("out"))
    assert FORWARD < error <= 5e-2  # above FORWARD, because it really computes in bfloat16


def with_fields(model, **fields):
    structure, _ = split(mp.create_model("mpdit_b", **{**vars(model.config), **fields}))
    return merge(structure, split(model)[1])
