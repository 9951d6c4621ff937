"""Flow maps: the network at r = t, its derivative, the solver on data whose exact map is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mpdit_jax as mp
from mpdit_jax.compile.flops import product_flops
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.flow.fields import Field
from mpdit_jax.flow.flow_map import FlowMapSolver, renoise
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.flow.solvers import Euler
from mpdit_jax.flow.times import UniformGrid
from mpdit_jax.io.pictures import to_uint8
from mpdit_jax.model.accounting import count_macs, count_trained
from mpdit_jax.model.parameters import merge, split
from mpdit_jax.sample.drawing import Drawing
from mpdit_jax.sample.exporting import export_sampler
from mpdit_jax.sample.trajectory import save_trajectory
from tests.flow.toys import GaussianModel, in_float64, tiny_model

LEVELS = {
    1: {"patch_sizes": (2,), "depths": (4,)},
    2: {"patch_sizes": (4, 2), "depths": (2, 1)},
    3: {"patch_sizes": (8, 4, 2), "depths": (1, 1, 1)},
}


def inputs(count=4):
    random = np.random.default_rng(1)
    x = jnp.asarray(random.standard_normal((count, 8, 8, 1)), jnp.float32)
    t = jnp.asarray(random.uniform(0.3, 1, count), jnp.float32)
    return x, t, jnp.arange(count)


@pytest.mark.parametrize("levels", LEVELS)
def test_at_r_equal_t_it_is_the_flow_model_bit_for_bit(levels):
    model = tiny_model(**LEVELS[levels])
    x, t, y = inputs()
    velocity, average = jax.jit(model)(x, t, y), jax.jit(model)(x, t, y, t)
    np.testing.assert_array_equal(velocity, average)
    assert np.abs(velocity - jax.jit(model)(x, t, y, t / 2)).max() > 1e-3


@pytest.mark.parametrize("levels", LEVELS)
def test_the_trunk_sees_t_and_the_tail_r(levels):
    """What the last level receives does not depend on r, and what leaves it does."""
    model = tiny_model(**LEVELS[levels])
    x, t, y = inputs()
    both = jax.jit(model)(x, t, y, t / 2)
    config = model.config
    condition = model.condition(model.modulation(t, t / 2), model.class_embedding(y))
    tokens = model.class_embedding(y).tokens
    for index, level in enumerate(model.levels):
        if levels > 1 and index == levels - 1:
            tokens = level(tokens, x, type(condition)(condition.tail, condition.tail), config.depths[-1])
        elif levels > 1:
            tokens = level(tokens, x, type(condition)(condition.trunk, condition.trunk), config.depths[index])
        else:
            image = level.embed(x)
            tokens = jnp.concatenate([tokens, image], axis=1)
            tokens = level.blocks(tokens, condition.trunk, slice(None, 3))
            tokens = level.blocks(tokens, condition.tail, slice(3, None))
    np.testing.assert_allclose(both, model.final_layer(tokens, condition.tail), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{"time_embedding": "fno", "fno_init": "scaled"}, {"remat": "full"}, {"guidance_max": 4.0}]
)
def test_the_derivative_equals_central_differences(fields):
    """du/dt along (v, 1, 0) of the whole network, float64."""
    with jax.enable_x64(True):
        model = in_float64(tiny_model(**LEVELS[2], **fields))
        x, t, y = inputs()
        x, t = x.astype(jnp.float64), t.astype(jnp.float64)
        v = jnp.asarray(np.random.default_rng(2).standard_normal(x.shape))

        @jax.jit
        def u(step):
            return model.velocity(x + step * v, model.modulation(t + step, t / 2), model.class_embedding(y))

        value, derivative = jax.jvp(u, (0.0,), (1.0,))
        h = 1e-3
        differences = (8 * (u(h) - u(-h)) - (u(2 * h) - u(-2 * h))) / (12 * h)
    assert value.dtype == derivative.dtype == np.float64
    assert np.abs(derivative).max() > 0.01
    assert np.abs(derivative - differences).max() <= 1e-6 * np.abs(derivative).max()


MEAN, STD = 0.7, 0.4


def spread(t):
    return np.sqrt((1 - t) ** 2 * STD**2 + t**2)


class GaussianMap(Field):
    """The exact flow map of data N(MEAN, STD²), and its velocity."""

    def prepare(self, times):
        return times

    def __call__(self, z, t):
        t = t.reshape(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * STD**2 + t**2
        centred = z - (1 - t) * MEAN
        return -MEAN + (t - (1 - t) * STD**2) / variance * centred

    def jump(self, z, t, r):
        t, r = t.reshape(-1, 1, 1, 1), r.reshape(-1, 1, 1, 1)
        ratio = jnp.sqrt((1 - r) ** 2 * STD**2 + r**2) / jnp.sqrt((1 - t) ** 2 * STD**2 + t**2)
        end = (1 - r) * MEAN + ratio * (z - (1 - t) * MEAN)
        return (z - end) / (t - r)


def test_the_exact_map_satisfies_the_identity():
    """u = v - (t - r) du/dt, the equation that training enforces."""
    with jax.enable_x64(True):
        field, z = GaussianMap(), jnp.asarray(np.random.default_rng(0).standard_normal((64, 1, 1, 1)))
        t, r = jnp.linspace(0.2, 1.0, 64), jnp.linspace(0.0, 0.9, 64) * jnp.linspace(0.2, 1.0, 64)
        v = field(z, t)
        u, derivative = jax.jvp(lambda z, t: field.jump(z, t, r), (z, t), (v, jnp.ones_like(t)))
        residual = u - (v - (t - r).reshape(-1, 1, 1, 1) * derivative)
    assert np.abs(residual).max() <= 1e-12


def test_the_conditional_target_averages_to_the_average_velocity():
    """E[v - (t - r) du/dt | z_t] = u, with v = n - x of one example: what training regresses on has the right mean."""
    field, z, t, r, random = GaussianMap(), 0.8, 0.6, 0.2, np.random.default_rng(0)
    variance = (1 - t) ** 2 * STD**2 + t**2
    mean = MEAN + (1 - t) * STD**2 / variance * (z - (1 - t) * MEAN)  # of x at this z_t
    x = mean + STD * t / np.sqrt(variance) * random.standard_normal((200_000, 1, 1, 1))
    v = jnp.asarray((z - (1 - t) * x) / t - x, jnp.float32)
    points, times = jnp.full(v.shape, z), jnp.full(len(v), t)
    u, derivative = jax.jvp(lambda z, t: field.jump(z, t, jnp.float32(r)), (points, times), (v, jnp.ones_like(times)))
    target = np.asarray(v - (t - r) * derivative)
    assert target.std() > 0.2
    assert abs(target.mean() - u[0, 0, 0, 0]) < 4 * target.std() / np.sqrt(len(target))


def test_one_jump_equals_two_and_four_and_euler_is_far_off():
    with jax.enable_x64(True):
        z = jnp.asarray(np.random.default_rng(0).standard_normal((256, 1, 1, 1)))
        drawn = {
            steps: FlowMapSolver().solve(GaussianMap(), z, UniformGrid(), steps, None).latents for steps in (1, 2, 4)
        }
        exact = MEAN + STD * z
        for steps, latents in drawn.items():
            np.testing.assert_allclose(latents, exact, rtol=0, atol=1e-12, err_msg=str(steps))
        euler = Euler().solve(GaussianMap(), z, UniformGrid(), 1, None).latents
    assert np.abs(euler - exact).max() > 0.3


def test_fresh_noise_keeps_the_distribution():
    """With churn the latents of an exact map are still N(MEAN, STD²), and no longer a function of the first noise."""
    z = jax.random.normal(jax.random.key(0), (20_000, 1, 1, 1))

    def increments(step):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), step), z.shape)

    for churn in (0.3, 1.0):
        latents = FlowMapSolver(churn).solve(GaussianMap(), z, UniformGrid(), 4, increments).latents
        assert abs(latents.mean() - MEAN) < 0.02
        assert abs(latents.std() - STD) < 0.02
        assert np.corrcoef(latents.ravel(), z.ravel())[0, 1] < 0.95
    assert np.corrcoef(latents.ravel(), z.ravel())[0, 1] < 0.05  # churn 1 forgets


def test_renoising_reaches_the_spread_of_t():
    signal, noise_std = renoise(np.array([0.0, 0.3]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(signal * np.array([1.0, 0.7]), 0.5)
    np.testing.assert_allclose(noise_std**2 + (signal * np.array([0.0, 0.3])) ** 2, 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("levels", LEVELS)
def test_the_sampler_makes_the_jumps_of_the_model(levels):
    model = tiny_model(**LEVELS[levels])
    y, key = jnp.arange(4), jax.random.key(0)
    solution = mp.make_sampler("flow_map", steps=2).solve(model, y, key, record=True)
    noise, middle, end = solution.path
    times = [jnp.full(4, value, jnp.float32) for value in (1.0, 0.5, 0.0)]
    np.testing.assert_allclose(middle, noise - 0.5 * model(noise, times[0], y, times[1]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(end, middle - 0.5 * model(middle, times[1], y, times[2]), rtol=0, atol=1e-5)
    assert solution.evaluations == 2


def test_guidance_combines_both_jumps():
    model = tiny_model(**LEVELS[2])
    y, key = jnp.arange(3), jax.random.key(0)
    guided = mp.make_sampler("flow_map", steps=2, guidance_scale=2.0).solve(model, y, key, record=True)
    z, times = guided.path[0], [jnp.full(3, value, jnp.float32) for value in (1.0, 0.5)]
    better, worse = (model(z, times[0], labels, times[1]) for labels in (y, jnp.full(3, 10)))
    np.testing.assert_allclose(guided.path[1], z - 0.5 * (worse + 2 * (better - worse)), rtol=0, atol=1e-5)


def test_an_exported_one_step_map_calls_the_network_once():
    """The file's matrix products are those of one forward pass, and four steps have four times as many."""
    model = tiny_model(**LEVELS[2], hidden_size=64, flow_map=True)
    labels, seed, products = np.arange(4, dtype=np.int32), np.uint32(3), {}
    for steps in (1, 4):
        sampler = mp.make_sampler("flow_map", steps)
        file = export_sampler(sampler, model, ("cpu",), batch=4)
        program = jax.jit(jax.export.deserialize(bytearray(file)).call).lower(labels, seed).compile()
        products[steps] = product_flops(program.as_text())
        expected = sampler(model, labels, seed_key(seed))
        np.testing.assert_allclose(program(labels, seed), expected, rtol=0, atol=1e-5)
    one_pass = 2 * 4 * count_macs(model.config)
    assert 0.8 < products[1] / one_pass <= 1  # the modulation is computed once, not for each of the four labels
    assert products[4] == pytest.approx(4 * products[1], rel=0.1)


def test_pictures_and_films_are_drawn_with_few_jumps(tmp_path):
    model, labels = tiny_model(**LEVELS[2], flow_map=True), np.arange(3)
    sampler = mp.make_sampler("flow_map", 2)
    expected = to_uint8(np.asarray(sampler(model, labels, seed_key(5))))[..., 0]
    found = mp.generate(model, labels, seed=5, solver="flow_map", steps=2)
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in found]), expected)
    drawing = Drawing(sampler, model, labels, 5, 3, None, {})
    save_trajectory(drawing, tmp_path / "film.gif", tmp_path / "strip.png")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3  # the noise, the state after one jump, the picture
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.width > strip.height > 0


def guided_model():
    return tiny_model(**LEVELS[2], flow_map=True, guidance_max=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2.5, [1.0, 2.0, 4.0]])
def test_the_guidance_scale_is_an_input_and_needs_one_pass(scale, recwarn):
    """The sampler's jumps and velocities are single calls of the model, with the scale as its argument."""
    model, y, w = guided_model(), jnp.arange(3), jnp.broadcast_to(jnp.float32(scale), 3)
    t, half = jnp.ones(3), jnp.full(3, 0.5)
    path = mp.make_sampler("flow_map", 2, scale).solve(model, y, jax.random.key(0), record=True).path
    np.testing.assert_allclose(path[1], path[0] - 0.5 * model(path[0], t, y, half, w), rtol=0, atol=1e-5)
    path = mp.make_sampler("euler", 2, scale).solve(model, y, jax.random.key(0), record=True).path
    np.testing.assert_allclose(path[1], path[0] - 0.5 * model(path[0], t, y, None, w), rtol=0, atol=1e-5)
    assert np.abs(model(path[0], t, y, None, w) - model(path[0], t, y)).max() > 1e-3
    assert not recwarn.list
    # Above the interval the scale is 1.
    low = mp.make_sampler("flow_map", 2, scale, guidance_interval=(0.0, 0.6))
    path = low.solve(model, y, jax.random.key(0), record=True).path
    np.testing.assert_allclose(path[1], path[0] - 0.5 * model(path[0], t, y, half), rtol=0, atol=1e-5)
    np.testing.assert_allclose(path[2], path[1] - 0.5 * model(path[1], half, y, 0 * t, w), rtol=0, atol=1e-5)


def test_an_untrained_guidance_input_changes_nothing():
    structure, parameters = split(guided_model())
    new = {name: 0 * leaf for name, leaf in parameters.items() if name.startswith("guidance_embedding.")}
    plain = merge(split(tiny_model(**LEVELS[2]))[0], {k: v for k, v in parameters.items() if k not in new})
    (x, t, y), model = inputs(), merge(structure, parameters | new)
    assert new
    np.testing.assert_array_equal(model(x, t, y, t / 2, jnp.full(4, 3.0)), plain(x, t, y, t / 2))
    fresh = mp.create_model("mpdit_b", **LEVELS[2], hidden_size=32, num_heads=2, input_size=8, guidance_max=4.0)
    assert not fresh.guidance_embedding.linear.kernel[...].any()
    assert count_trained(fresh.config) == sum(leaf.size for leaf in split(fresh)[1].values())


def test_bad_guidance_inputs():
    model, (x, t, y) = guided_model(), inputs()
    sampler = mp.make_sampler("flow_map", steps=1)
    with pytest.raises(InputError, match="guidance_scale=5: this model takes the scale as an input and was trained"):
        sampler(model, y, jax.random.key(0), guidance_scale=5.0)
    with pytest.raises(InputError, match=r"guidance_scale=0\.5: this model takes the scale"):
        sampler(model, y, jax.random.key(0), guidance_scale=0.5)
    with pytest.raises(InputError, match="negative_labels: the model takes its guidance scale as an input"):
        sampler(model, y, jax.random.key(0), guidance_scale=2.0, negative_labels=3)
    with pytest.raises(InputError, match="w from 0 to 3: this model was trained with scales from 1 to 4"):
        model(x, t, y, t, jnp.arange(4.0))
    with pytest.raises(InputError, match=r"w \(2,\): expected one guidance scale for each of t \(4,\)"):
        model(x, t, y, t, jnp.ones(2))
    with pytest.raises(InputError, match="this model takes no guidance scale"):
        tiny_model(**LEVELS[2])(x, t, y, t, jnp.ones(4))
    with pytest.raises(ConfigError, match=r"model.guidance_max=0\.5: expected a scale from 1"):
        tiny_model(guidance_max=0.5)


def test_a_map_runs_every_ode_solver():
    model = tiny_model(**LEVELS[2], flow_map=True)
    plain = tiny_model(**LEVELS[2])
    for solver in ("euler", "heun", "dpmpp_2m"):
        drawn = [mp.make_sampler(solver, steps=4)(one, jnp.arange(2), jax.random.key(0)) for one in (model, plain)]
        np.testing.assert_array_equal(*drawn)


def test_what_draws_poorly_is_warned_of():
    plain, trained = tiny_model(**LEVELS[2]), tiny_model(**LEVELS[2], flow_map=True)
    y, key = jnp.arange(2), jax.random.key(0)
    with pytest.warns(UserWarning, match="not trained as a flow map"):
        mp.make_sampler("flow_map", steps=1)(plain, y, key)
    with pytest.warns(UserWarning, match="two passes spoils a flow map"):
        mp.make_sampler("flow_map", steps=2, guidance_scale=2.0)(trained, y, key)


def test_sit_maps_run_in_its_own_time():
    """A SiT's time runs the other way: the jump from t to r is the negative of its jump from 1 - t to 1 - r."""
    sit = tiny_model(**LEVELS[1], condition="vector", class_tokens=16, modulation="per_block", convention="sit")
    z = mp.make_sampler("flow_map", steps=2).solve(mp.as_velocity(sit), jnp.arange(2), jax.random.key(0), record=True)
    times = jnp.zeros(2), jnp.full(2, 0.5)
    embedding = sit.class_embedding(jnp.arange(2))
    u = -sit.velocity(z.path[0], sit.modulation(*times), embedding)
    np.testing.assert_allclose(z.path[1], z.path[0] - 0.5 * u, rtol=0, atol=1e-5)


def test_bad_input():
    model, (x, t, y) = tiny_model(**LEVELS[2]), inputs()
    with pytest.raises(InputError, match="a flow map goes to an earlier time, 0 <= r <= t"):
        model(x, t, y, t + 0.1)
    with pytest.raises(InputError, match=r"r \(2,\): expected one time for each of t \(4,\)"):
        model(x, t, y, t[:2])
    with pytest.raises(InputError, match="a model of one block cannot be a flow map"):
        tiny_model(patch_sizes=(2,), depths=(1,))(x, t, y, t)
    with pytest.raises(ConfigError, match="churn=2: expected a number from 0"):
        mp.make_sampler("flow_map", churn=2)
    with pytest.raises(InputError, match="solver='flow_map' needs an MPDiT"):
        mp.make_sampler("flow_map", steps=2)(GaussianModel(), jnp.arange(2), jax.random.key(0))
    with pytest.raises(ConfigError, match="a flow map needs decoder_depth=0"):
        tiny_model(patch_sizes=(2,), depths=(4,), decoder_depth=1, flow_map=True)
    dit = tiny_model(**LEVELS[1], condition="vector", class_tokens=16, modulation="per_block", convention="dit")
    with pytest.raises(InputError, match="DiTVelocity cannot be a flow map"):
        mp.make_sampler("flow_map", steps=2)(mp.as_velocity(dit), jnp.arange(2), jax.random.key(0))
