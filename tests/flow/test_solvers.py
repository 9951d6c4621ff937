"""Solvers against equations with a known solution, and against golden arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.errors import ConfigError
from mpdit_jax.flow.adaptive import Adaptive
from mpdit_jax.flow.registry import SOLVERS, get_solver
from mpdit_jax.flow.solvers import DPMpp2M, Euler, Heun, Midpoint
from mpdit_jax.flow.stochastic import DIFFUSIONS, EulerMaruyama
from mpdit_jax.flow.times import QuadraticGrid, ShiftedGrid, UniformGrid, get_time_grid
from tests.conftest import relative_error
from tests.flow.toys import COVARIANCE, MEAN, FunctionField, GaussianModel, counting_model, tiny_model

DERIVED = 2e-4
FIXED = ("euler", "heun", "midpoint", "dpmpp_2m", "euler_maruyama")


class InnerGrid:
    """Uniform times from 0.9 to 0.1, where λ of DPM-Solver++ is finite."""

    def times(self, intervals):
        return np.linspace(0.9, 0.1, intervals + 1)


def growth(z, t):
    """dz/dt = z cos 3t - t, an ODE without symmetries that could raise a solver's order."""
    return z * jnp.cos(3 * t).reshape(-1, 1, 1, 1) - t.reshape(-1, 1, 1, 1)


def reference(z, start, end):
    """Solve `growth` by classical Runge–Kutta with steps so small that only rounding errors remain."""
    times = np.linspace(start, end, 2001)
    for t, h in zip(times[:-1], np.diff(times), strict=True):
        k1 = z * np.cos(3 * t) - t
        k2 = (z + h / 2 * k1) * np.cos(3 * (t + h / 2)) - (t + h / 2)
        k3 = (z + h / 2 * k2) * np.cos(3 * (t + h / 2)) - (t + h / 2)
        k4 = (z + h * k3) * np.cos(3 * (t + h)) - (t + h)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


def no_noise(step):
    raise AssertionError("a deterministic solver asked for noise")


def error(solver, grid, steps, start=1.0, end=0.0):
    z = np.linspace(-2, 2, 5).reshape(5, 1, 1, 1)
    found = jax.jit(lambda z: solver.solve(FunctionField(growth), z, grid, steps, no_noise).latents)(z)
    return np.abs(found - reference(z, start, end)).max()


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (Heun(), 2), (Midpoint(), 2)])
@pytest.mark.parametrize("grid", [UniformGrid(), ShiftedGrid(2.0), QuadraticGrid()])
def test_order_of_accuracy(float64, solver, order, grid):
    coarse, fine = error(solver, grid, 256), error(solver, grid, 512)
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_order_of_dpmpp_2m(float64):
    coarse, fine = (error(DPMpp2M(), InnerGrid(), steps, 0.9, 0.1) for steps in (256, 512))
    assert np.log2(coarse / fine) == pytest.approx(2, abs=0.15)
    # From 1 to 0, both ends have Euler steps and their neighbours are long in λ: the error is of order log N / N².
    coarse, fine = error(DPMpp2M(), UniformGrid(), 256), error(DPMpp2M(), UniformGrid(), 512)
    assert np.log2(coarse / fine) > 1.6


@pytest.mark.parametrize("diffusion", ["sigma", "SBDM"])
def test_strong_order_of_euler_maruyama(float64, diffusion):
    """With noise that does not depend on z, paths of one Brownian motion converge with order 1."""
    solver, z = EulerMaruyama(diffusion, start=0.9, end=0.1), np.linspace(-2, 2, 256).reshape(256, 1, 1, 1)

    def path(noise):
        noise = jnp.asarray(noise)
        return solver.solve(FunctionField(growth), z, UniformGrid(), len(noise) + 1, lambda step: noise[step]).latents

    fine = np.random.default_rng(0).normal(size=(1024, *z.shape))
    middle = (fine[::2] + fine[1::2]) / np.sqrt(2)  # the same motion in steps of twice the length
    coarse = (middle[::2] + middle[1::2]) / np.sqrt(2)
    first, second, third = (np.asarray(jax.jit(path)(noise)) for noise in (coarse, middle, fine))
    assert np.log2(np.std(first - second) / np.std(second - third)) == pytest.approx(1, abs=0.15)


def test_an_odd_count_keeps_second_order(float64):
    for solver in (Heun(), Midpoint()):
        coarse, fine = error(solver, UniformGrid(), 255), error(solver, UniformGrid(), 511)
        assert np.log2(coarse / fine) == pytest.approx(2, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_adaptive_solvers_meet_their_tolerance(float64, method):
    loose, tight = (error(Adaptive(method, rtol=tol, atol=tol), UniformGrid(), 1) for tol in (1e-4, 1e-8))
    assert tight < 1e-7
    assert tight < loose < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_order_of_adaptive_solvers(float64, monkeypatch, method):
    """With constant step sizes. The ODE is faster than `growth`, so that the error is far above rounding."""
    import diffrax

    monkeypatch.setattr(diffrax, "PIDController", lambda **tolerances: diffrax.ConstantStepSize())
    field = FunctionField(lambda z, t: 9 * jnp.cos(9 * t).reshape(-1, 1, 1, 1) * z)
    z = np.linspace(0.5, 2, 3).reshape(3, 1, 1, 1)

    def largest_error(steps):
        monkeypatch.setattr("mpdit_jax.flow.adaptive._FIRST_STEP", 1 / steps)
        found = jax.jit(lambda z: Adaptive(method).solve(field, z, UniformGrid(), 1, no_noise))(z)
        assert found.evaluations.tolist() == [6 * steps + 1] * 3
        return np.abs(found.latents - z * np.exp(-np.sin(9))).max()

    assert np.log2(largest_error(128) / largest_error(256)) == pytest.approx(5, abs=0.15)


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_are_evaluations(solver, steps):
    model, seen = counting_model()
    solution = mp.make_sampler(solver, steps=steps).solve(model, [1, 2], jax.random.key(0))
    jax.effects_barrier()
    assert len(seen) == int(solution.evaluations) == steps
    assert {times.shape for times in seen} == {(2,)}


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_adaptive_evaluations_are_counted(method):
    model, seen = counting_model()
    solution = mp.make_sampler(method, rtol=1e-3, atol=1e-3).solve(model, [1, 2], jax.random.key(0))
    jax.effects_barrier()
    assert solution.evaluations.shape == (2,)
    assert len(seen) == int(solution.evaluations.max()) > 3


@pytest.mark.slow
@pytest.mark.parametrize("solver", [*FIXED, "dopri5", "tsit5"])
def test_gaussian_data_are_recovered(solver):
    """With the exact velocity of Gaussian data, samples have the data's mean and covariance."""
    steps = {"euler": 250, "euler_maruyama": 500}.get(solver, 60)
    labels = np.full(8_000, 1)
    z = mp.make_sampler(solver, steps=steps)(GaussianModel(), labels, jax.random.key(3))[:, 0, 0]
    deviation = np.sqrt(np.diag(COVARIANCE).max() / len(labels))
    assert np.abs(z.mean(0) - (MEAN + 1)).max() < 4 * deviation + 0.01
    assert np.abs(np.cov(z.T) - COVARIANCE).max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_every_diffusion_keeps_the_density(diffusion):
    sampler = mp.make_sampler("euler_maruyama", steps=400, diffusion=diffusion, start=0.99, end=0.01)
    z = sampler(GaussianModel(), np.zeros(8_000, int), jax.random.key(4))[:, 0, 0]
    assert np.abs(z.mean(0) - MEAN).max() < 0.06
    assert np.abs(np.cov(z.T) - COVARIANCE).max() < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("diffusion", ["SBDM", "sigma"])
def test_golden_euler_maruyama(golden, diffusion):
    model, increments = mp.load_torch(golden.group("state/"), num_heads=4), golden.images("em_noise")
    sampler = mp.make_sampler(
        "euler_maruyama", len(increments) + 1, guidance_scale=float(golden["cfg_scale"]), diffusion=diffusion
    )
    z = sampler(model, golden["y"], jax.random.key(0), golden.images("n"), increments=increments)
    assert relative_error(z, golden.images(f"em_{diffusion}")) <= DERIVED


def test_the_noise_of_a_stochastic_solver_depends_on_the_key():
    sampler = mp.make_sampler("euler_maruyama", steps=20)
    noise = jnp.zeros((4, 1, 1, 4))
    first, again = (sampler(GaussianModel(), [0, 0, 0, 0], jax.random.key(5), noise) for _ in range(2))
    assert np.array_equal(first, again)
    assert len(np.unique(first[:, 0, 0, 0])) == 4  # every image its own
    other = sampler(GaussianModel(), [0, 0, 0, 0], jax.random.key(6), noise)
    assert not np.isclose(first, other).any()


def test_without_noise_the_stochastic_solver_is_the_ode():
    sampler = mp.make_sampler("euler_maruyama", steps=400, norm=0.0, diffusion="sigma", start=0.999, end=0.001)
    ode = mp.make_sampler("heun", steps=400)
    labels, key = [0, 1, 2], jax.random.key(0)
    assert relative_error(sampler(GaussianModel(), labels, key), ode(GaussianModel(), labels, key)) < 0.02


def test_time_grids():
    for name in ("uniform", "shifted", "quadratic"):
        times = get_time_grid(name).times(7)
        assert times.shape == (8,)
        assert (times[0], times[-1]) == (1.0, 0.0)
        assert (np.diff(times) < 0).all()
    assert np.allclose(UniformGrid().times(4), [1, 0.75, 0.5, 0.25, 0])
    assert np.allclose(QuadraticGrid().times(2), [1, 0.25, 0])
    assert np.allclose(ShiftedGrid(3.0).times(2), [1, 0.75, 0])
    assert np.allclose(ShiftedGrid(1.0).times(5), UniformGrid().times(5))


@pytest.mark.slow
def test_the_path_runs_from_the_noise_to_the_latents():
    model = tiny_model(flow_map=True)
    noise = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    for name in SOLVERS:
        solution = mp.make_sampler(name, steps=7).solve(model, [0, 1], jax.random.key(0), noise, record=True)
        assert np.array_equal(solution.path[0], noise), name
        assert np.array_equal(solution.path[-1], solution.latents), name
        assert len(solution.path) == len(solution.path_times), name
        assert solution.path_times[-1] == 0, name
        assert (np.diff(solution.path_times) < 0).all(), name


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda: get_solver("heum"), "unknown solver 'heum'.*did you mean 'heun'"),
    (lambda: get_solver("euler", rtol=1e-3), "rtol=0.001 is not an option of solver 'euler'.*no options"),
    (lambda: get_solver("dopri5", tol=1e-3), "tol=0.001.*its options are rtol, atol"),
    (lambda: get_solver("dopri5", rtol=-1), "rtol=-1.*small positive"),
    (lambda: get_solver("tsit5", rtol=0, atol=0), "rtol=0.*small positive"),
    (lambda: get_solver("euler_maruyama", diffusion="sbdm"), "diffusion='sbdm'.*did you mean|diffusion='sbdm'"),
    (lambda: get_solver("euler_maruyama", norm=-1), "norm=-1"),
    (lambda: EulerMaruyama(start=0.1, end=0.5), "0 < end < start < 1"),
    (lambda: get_time_grid("shift"), "unknown time grid 'shift'.*did you mean 'shifted'"),
    (lambda: ShiftedGrid(0), "time_shift=0"),
])  # fmt: skip
def test_impossible_settings_are_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_a_missing_diffrax_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(mp.MPDiTError, match=r"need diffrax: install mpdit_jax with its extra \[adaptive\]"):
        mp.make_sampler("dopri5", rtol=2e-3)(GaussianModel(), [0], jax.random.key(0))
