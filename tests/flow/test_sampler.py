"""The sampler: what an image depends on, what is compiled, and use inside jit and shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import mpdit_jax as mp
from mpdit_jax.errors import InputError
from mpdit_jax.flow.sampler import _solve
from tests.conftest import relative_error
from tests.flow.toys import GaussianModel, tiny_model

KEY = jax.random.key(7)
LABELS = np.array([3, 1, 4, 1, 5, 9, 2, 6])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_an_image_does_not_depend_on_its_batch(model, solver):
    sampler = mp.make_sampler(solver, steps=5, guidance_scale=2.0)
    whole = sampler(model, LABELS, KEY)
    assert np.array_equal(whole, sampler(model, LABELS, KEY))
    # At the same shape, other neighbours change no bit.
    others = sampler(model, np.where(np.arange(8) == 2, LABELS, 0), KEY)
    assert np.array_equal(others[2], whole[2])
    assert not np.array_equal(others[3], whole[3])
    # In another position in the batch.
    order = np.array([2, 5, 0, 1, 3, 4, 7, 6])
    assert np.array_equal(sampler(model, LABELS[order], KEY, indices=order), whole[order])
    # In batches of other sizes.
    parts = [sampler(model, LABELS[rows], KEY, indices=rows) for rows in (np.arange(3), np.arange(3, 8))]
    assert relative_error(np.concatenate(parts), whole) < 1e-5
    # Another key gives other images.
    assert relative_error(sampler(model, LABELS, jax.random.key(8)), whole) > 0.1


def test_a_key_of_another_implementation_gives_noise_that_depends_on_the_image_alone(model):
    sampler, rows = mp.make_sampler("euler", steps=5, guidance_scale=2.0), np.arange(3, 8)
    key = jax.random.key(7, impl="rbg")
    whole = sampler(model, LABELS, key)
    assert relative_error(sampler(model, LABELS[rows], key, indices=rows), whole[rows]) < 1e-5
    assert np.array_equal(sampler(model, LABELS, jax.random.key_data(key)), whole)  # the old kind of key
    assert relative_error(sampler(model, LABELS, jax.random.key(8, impl="rbg")), whole) > 0.1
    assert np.array_equal(sampler(model, LABELS, jax.random.PRNGKey(7)), sampler(model, LABELS, KEY))


@pytest.mark.slow
def test_images_are_the_same_in_x64_mode():
    sampler, adaptive = mp.make_sampler("euler_maruyama", steps=4), mp.make_sampler("tsit5", rtol=1e-2, atol=1e-2)
    expected = sampler(GaussianModel(), [0, 1, 2], KEY)
    with jax.enable_x64(True):
        found = sampler(GaussianModel(), [0, 1, 2], KEY)
        other = adaptive(GaussianModel(), [0, 1, 2], KEY)
    assert (found.dtype, other.dtype) == (jnp.float32, jnp.float32)
    assert relative_error(found, expected) < 1e-5


def test_indices_are_numbers_of_images(model):
    sampler = mp.make_sampler(steps=3, guidance_scale=2.0)
    for indices, sentence in (
        (np.arange(8) / 2, "dtype float64: expected a whole number"),
        (np.arange(7), r"indices \(7,\)"),
        (np.arange(8) - 1, "index -1"),
        (np.arange(8) + 2**32 - 8, "index 4294967295: expected the index of an image, from 0 to 4294967294"),
    ):
        with pytest.raises(InputError, match=sentence):
            sampler(model, LABELS, KEY, indices=indices)
    sampler(model, LABELS, KEY, indices=np.arange(8) + 2**32 - 9)


@pytest.mark.slow
def test_in_bfloat16_an_image_depends_on_its_batch_by_no_more_than_docs_say():
    model = tiny_model(hidden_size=128, num_heads=4, depths=(3, 2))
    sampler = mp.make_sampler(steps=50, guidance_scale=2.0, precision="bfloat16")
    whole = sampler(model, LABELS, KEY)
    others = sampler(model, np.where(np.arange(8) == 2, LABELS, 0), KEY)
    assert np.array_equal(others[2], whole[2])  # at the same batch shape, bitwise equal
    rows = np.arange(3, 8)
    found = relative_error(sampler(model, LABELS[rows], KEY, indices=rows), whole[rows])
    assert found < 2**-8, found


@pytest.mark.slow
def test_an_adaptive_image_does_not_depend_on_its_batch(model):
    sampler = mp.make_sampler("tsit5", guidance_scale=2.0, rtol=1e-4, atol=1e-4)
    whole = sampler(model, LABELS, KEY)
    rows = np.array([2, 3])
    # Rounding may move a step, so images agree to the tolerance of the solver.
    assert relative_error(sampler(model, LABELS[rows], KEY, indices=rows), whole[rows]) < 1e-3


def test_nothing_is_compiled_again(model):
    sampler = mp.make_sampler(steps=3, guidance_scale=2.0)
    sampler(model, LABELS, KEY).block_until_ready()
    other_model, other_key = tiny_model(), jax.random.key(1)  # creating them compiles programs of their own
    before, count = _solve._cache_size(), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: count.append(event) if event.endswith("backend_compile_duration") else None
    )
    try:
        sampler(model, LABELS[::-1].copy(), other_key)
        sampler(model, LABELS, KEY, guidance_scale=3.5)
        sampler(other_model, LABELS, KEY)
        mp.make_sampler(steps=3, guidance_scale=1.25)(model, LABELS, KEY)
    finally:
        jax.monitoring.clear_event_listeners()
    assert _solve._cache_size() == before
    assert not count
    sampler(model, LABELS[:2], KEY)
    assert _solve._cache_size() == before + 1


def test_inside_a_users_jit(model):
    from flax import nnx

    sampler = mp.make_sampler(steps=3, guidance_scale=2.0)
    expected = sampler(model, LABELS, KEY)

    @jax.jit
    def closed_over(labels, seed, scale):
        return sampler(model, labels, jax.random.key(seed), guidance_scale=scale) + 1

    assert relative_error(closed_over(LABELS, 7, 2.0) - 1, expected) < 1e-5
    structure, state = nnx.split(model)
    passed = jax.jit(lambda state, labels: sampler(nnx.merge(structure, state), labels, KEY))
    assert relative_error(passed(state, LABELS), expected) < 1e-5


@pytest.mark.parametrize(("labels", "sentence"), [
    (np.array([1.7, 2.2]), r"labels of shape \(2,\), dtype float32"),
    (np.array([[1], [2]]), r"labels of shape \(2, 1\), dtype int32"),
    (np.array([True, False]), "dtype bool"),
])  # fmt: skip
def test_shapes_of_traced_labels_are_checked(model, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        jax.eval_shape(lambda labels: mp.make_sampler(steps=3)(model, labels, KEY), labels)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"solver": "euler", "guidance_interval": (0.2, 0.8)},
    {"solver": "dpmpp_2m"},
    {"solver": "heun", "steps": 5},
    {"solver": "euler_maruyama"},
    {"solver": "tsit5", "rtol": 1e-2, "atol": 1e-2},
])  # fmt: skip
def test_inside_a_users_shard_map(model, settings):
    mesh = jax.make_mesh((1,), ("devices",), (AxisType.Auto,), devices=jax.devices()[:1])
    sampler = mp.make_sampler(**{"steps": 4, "guidance_scale": 2.0, **settings})
    rows = PartitionSpec("devices")

    def draw(**options):
        def local(labels, indices):
            return sampler(model, labels, KEY, indices=indices)

        mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows, **options)
        return jax.jit(mapped)(jnp.asarray(LABELS), jnp.arange(8))

    if settings.get("solver") == "tsit5":
        with pytest.raises(InputError, match=r"tsit5 runs inside jax\.shard_map with check_vma=False only"):
            draw()
        found = draw(check_vma=False)
    else:
        found = draw()
    assert relative_error(found, sampler(model, LABELS, KEY)) < 1e-5


def test_bfloat16_is_near_float32(model):
    exact = mp.make_sampler(steps=10, guidance_scale=1.5)(model, LABELS, KEY)
    coarse = mp.make_sampler(steps=10, guidance_scale=1.5, precision="bfloat16")(model, LABELS, KEY)
    assert coarse.dtype == jnp.float32
    assert 1e-5 < relative_error(coarse, exact) < 2e-2
    assert np.array_equal(mp.make_sampler(steps=10, guidance_scale=1.5, precision="float32")(model, LABELS, KEY), exact)


def test_a_cast_model_is_one_made_in_that_dtype():
    found, expected = tiny_model().astype("bfloat16"), tiny_model(dtype="bfloat16")
    x, t = jax.random.normal(KEY, (2, 8, 8, 1)), jnp.array([0.2, 0.7])
    assert found.levels[0].blocks.layers.mlp.inner.kernel.dtype == jnp.bfloat16
    assert found.final.kernel.dtype == jnp.float32
    assert np.array_equal(found(x, t, LABELS[:2]), expected(x, t, LABELS[:2]))


def test_time_is_embedded_once(model, monkeypatch):
    """The modulation is computed once for all steps, outside the loop."""
    from mpdit_jax.model.mpdit import MPDiT

    asked = []
    original = MPDiT.modulation
    monkeypatch.setattr(MPDiT, "modulation", lambda self, t: asked.append(t.shape) or original(self, t))
    mp.make_sampler(steps=17, guidance_scale=2.0)(model, LABELS[:3], KEY)
    assert asked == [(17,)]


def test_a_nan_stays_in_its_own_image(model):
    noise = np.array(jax.random.normal(KEY, (4, 8, 8, 1)))
    clean = mp.make_sampler(steps=3, guidance_scale=2.0)(model, LABELS[:4], KEY, noise)
    noise[2, 0, 0] = np.nan
    found = mp.make_sampler(steps=3, guidance_scale=2.0)(model, LABELS[:4], KEY, noise)
    assert np.isnan(found[2]).any()
    assert np.array_equal(np.delete(found, 2, 0), np.delete(clean, 2, 0))
