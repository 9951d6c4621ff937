"""The sampler: labels to latents in one jitted call."""

import dataclasses
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpdit_jax.distributed.mesh import with_auto_axes
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.flow.fields import Field, model_field, takes_scale
from mpdit_jax.flow.flow_map import FlowMapSolver
from mpdit_jax.flow.guidance import guided_field
from mpdit_jax.flow.inputs import (
    Negatives,
    check_guide,
    check_indices,
    check_key,
    check_labels,
    check_model,
    check_negatives,
    check_null_class,
    check_scale,
    check_shape,
    is_traced,
)
from mpdit_jax.flow.protocols import Castable, ClassConditional, FlowMap, GuidedMap
from mpdit_jax.flow.randomness import GivenIncrements, draw_noise, noise_increments, threefry
from mpdit_jax.flow.registry import get_solver
from mpdit_jax.flow.solvers import Solution, Solver
from mpdit_jax.flow.times import TimeGrid, check_times, get_time_grid
from mpdit_jax.validation import is_whole

PRECISIONS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that a sampler's program is compiled for. Hashable, as a static argument of jit."""

    solver: Solver
    steps: int
    time_grid: TimeGrid
    guidance_interval: tuple[float, float]
    precision: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A function that draws latents from a model; built by `make_sampler`.

    It compiles once for each batch shape and model structure; other labels, keys, weights and guidance scales reuse the
    program. A guidance scale of exactly 1 has a program of its own, without a second pass. The sampler may be called
    inside `jit` and `shard_map`.
    """

    settings: Settings
    guidance_scale: np.ndarray | jax.Array

    def __call__(
        self,
        model: nnx.Module,
        labels: jax.typing.ArrayLike,
        key: jax.Array,
        noise: jax.Array | None = None,
        *,
        indices: jax.typing.ArrayLike | None = None,
        guidance_scale: jax.typing.ArrayLike | None = None,
        negative_labels: Negatives = None,
        guide: nnx.Module | None = None,
        increments: jax.Array | None = None,
    ) -> jax.Array:
        """Draw one latent for each label.

        Args:
            model: an MPDiT, or any NNX module with its call signature, `input_shape` and `num_classes`.
            labels: int (B,), each in [0, num_classes].
            key: a JAX random key; a key of another implementation is converted to Threefry. Image i depends on
                (key, indices[i], labels[i]) and the settings alone, not on B.
            noise: initial noise (B, H, W, C); default drawn from `key`.
            indices: index of each image, int (B,) below 2**32 - 1; default 0, 1, …
            guidance_scale: one number, or one for each label (B,); default the sampler's own.
            negative_labels: labels to guide away from: one for each image (B,), one for all, or `{class: negative}`;
                default, also for a class without an entry, the null class. Not used at guidance scale 1.
            guide: a second, weaker model to guide away from (autoguidance), called with the negative labels or, by
                default, the same labels. Not used at guidance scale 1.
            increments: noise (steps - 1, B, H, W, C) of a stochastic solver; default drawn from `key`.

        Returns:
            Latents float32 (B, H, W, C) in the space of the training data. Those of a run on a latent store are
            normalized; the run's data.json has `mean` and `std`.

        Raises:
            InputError: a label is out of range, an array has the wrong shape, a scale is negative, or the model does
                not fit a sampler.
        """
        return self.solve(
            model,
            labels,
            key,
            noise,
            indices=indices,
            guidance_scale=guidance_scale,
            negative_labels=negative_labels,
            guide=guide,
            increments=increments,
        ).latents

    def solve(
        self,
        model: nnx.Module,
        labels: jax.typing.ArrayLike,
        key: jax.Array,
        noise: jax.Array | None = None,
        *,
        indices: jax.typing.ArrayLike | None = None,
        guidance_scale: jax.typing.ArrayLike | None = None,
        negative_labels: Negatives = None,
        guide: nnx.Module | None = None,
        increments: jax.Array | None = None,
        record: bool = False,
    ) -> Solution:
        """Draw latents as `__call__` does; return also the evaluation count and, with `record`, the whole path."""
        check_model(model)
        if guide is not None:
            check_model(guide, "guide")
        check_key(key)
        given, table = (negative_labels, None) if not isinstance(negative_labels, Mapping) else (None, negative_labels)

        def draw(model: nnx.Module, guide: nnx.Module | None, negatives: Negatives, *arrays: Any) -> Solution:
            return self._draw(model, guide, negatives if table is None else table, record, *arrays)

        arrays = (given, labels, key, noise, indices, guidance_scale, increments)
        split = Solution(latents=0, evaluations=-1, path_times=-1, path=1)  # type: ignore[arg-type]
        return with_auto_axes(draw, (model, guide), arrays, batched=(labels, noise, indices), out=split)

    def _draw(
        self,
        model: nnx.Module,
        guide: nnx.Module | None,
        negative_labels: Negatives,
        record: bool,
        labels: jax.typing.ArrayLike,
        key: jax.Array,
        noise: jax.Array | None,
        indices: jax.typing.ArrayLike | None,
        guidance_scale: jax.typing.ArrayLike | None,
        increments: jax.Array | None,
    ) -> Solution:
        """`solve` under automatic axes."""
        target = check_model(model)
        labels = check_labels(labels, target.num_classes)
        key = threefry(key)
        count, shape = labels.shape[0], tuple(target.input_shape)
        scale = check_scale(self.guidance_scale if guidance_scale is None else guidance_scale, count)
        default = labels if guide is not None else jnp.full_like(labels, target.num_classes)
        negatives = check_negatives(negative_labels, labels, target.num_classes, default)
        if guide is not None:
            check_guide(guide, target)
        elif takes_scale(model):
            _check_input_scale(cast(GuidedMap, model), scale, negatives=negatives is not default)
        indices = check_indices(indices, count)
        if noise is None:
            noise = draw_noise(key, indices, shape)
        noise = check_shape(noise, (count, *shape), "noise", f"one latent for each of {count} labels")
        if increments is not None:
            expected = (self.settings.steps - 1, count, *shape)
            increments = check_shape(increments, expected, "increments", "one for each step but the last")
        # If the scale is known to be 1 everywhere, the program has no second pass.
        guided = is_traced(scale) or bool(np.any(np.asarray(scale) != 1))
        given = bool(negative_labels) if isinstance(negative_labels, Mapping) else negative_labels is not None
        by_default = guided and guide is None and not given
        check_null_class(target, labels, negatives if guided else None, by_default)
        _warn_of_maps(model, self.settings, two_passes=guided and (guide is not None or not takes_scale(model)))
        structure, state = nnx.split(model)
        guide_parts = nnx.split(guide) if guide is not None and guided else (None, None)
        arrays = (state, guide_parts[1], labels, negatives, scale, noise, key, indices, increments)
        return _solve(structure, guide_parts[0], self.settings, guided, record, *arrays)


def make_sampler(
    solver: str | Solver = "euler",
    steps: int = 250,
    guidance_scale: jax.typing.ArrayLike = 1.0,
    *,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    time_grid: str | TimeGrid = "uniform",
    precision: str | None = None,
    **solver_options: Any,
) -> Sampler:
    """Build a sampling function `sampler(model, labels, key, noise=None, …) -> latents`, jitted once for each shape.

    Args:
        solver: "euler", "heun", "midpoint", "dpmpp_2m", "flow_map", "euler_maruyama", "dopri5", "tsit5", or a `Solver`.
        steps: number of velocity evaluations, in second-order solvers too. Adaptive solvers ignore it.
        guidance_scale: w in v_null + w (v_class - v_null), one number or one for each label; 1.0 is the conditional
            model, without a second pass. A flow map with config.model.guidance_max takes it as an input, in one pass.
        guidance_interval: times (t_low, t_high) at which to guide; elsewhere there is no second pass.
        time_grid: "uniform", "shifted", "quadratic", or a `TimeGrid`, such as ShiftedGrid(2.0).
        precision: compute dtype of the model, "float32" or "bfloat16"; default the model's own.
        **solver_options: fields of the solver, such as rtol and atol of "dopri5" or diffusion of "euler_maruyama".

    Raises:
        ConfigError: an unknown name, steps below 1, a negative guidance scale, an interval that is reversed or outside
            [0, 1], or a custom solver or time grid that breaks its protocol.
    """
    if not is_whole(steps) or steps < 1:
        raise ConfigError(f"steps={steps!r}: expected a whole number of velocity evaluations, 1 or more.")
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}.")
    try:
        scale = check_scale(guidance_scale)
    except InputError as error:
        raise ConfigError(str(error)) from error
    interval = _check_interval(guidance_interval)
    grid = get_time_grid(time_grid)
    check_times(grid, int(steps))
    settings = Settings(get_solver(solver, **solver_options), int(steps), grid, interval, precision)
    for value in (settings.solver, grid):
        try:
            hash(value)
        except TypeError as error:
            raise ConfigError(f"{value!r} is not hashable ({error}): make it a frozen dataclass of numbers.") from error
    return Sampler(settings, scale)


def _check_input_scale(model: GuidedMap, scale: jax.Array | np.ndarray, negatives: bool) -> None:
    """Raise InputError for guidance that a model with the scale as an input was not trained for."""
    if negatives:
        raise InputError(
            "negative_labels: the model takes its guidance scale as an input, for the null class alone; leave them out."
        )
    if not is_traced(scale):
        outside = np.atleast_1d(scale)[(np.atleast_1d(scale) < 1) | (np.atleast_1d(scale) > model.guidance_max)]
        if outside.size:
            raise InputError(
                f"guidance_scale={outside[0]:g}: this model takes the scale as an input and was trained with 1 to "
                f"{model.guidance_max:g}."
            )


def _warn_of_maps(model: nnx.Module, settings: Settings, two_passes: bool) -> None:
    """Warn of settings with which a flow map, or a model sampled as one, draws poor images."""
    if not isinstance(settings.solver, FlowMapSolver):
        return
    trained = isinstance(model, FlowMap) and model.flow_map
    if not trained and settings.steps == 1:
        warnings.warn(
            "solver='flow_map' with steps=1 and a model that was not trained as a flow map draws noise: use 4 steps or "
            "more, or train with config.objective='flow_map'.",
            stacklevel=5,
        )
    if trained and two_passes:
        warnings.warn(
            "guidance by two passes spoils a flow map: train it with config.model.guidance_max, which makes the scale "
            "an input, or with config.flow_map.guidance.",
            stacklevel=5,
        )


def _check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in interval)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"guidance_interval={interval!r}: expected two times (low, high) in [0, 1].") from error
    if not 0 <= low <= high <= 1:
        raise ConfigError(
            f"guidance_interval=({low:g}, {high:g}): expected 0 <= low <= high <= 1 (0 is the data, 1 the noise)."
        )
    return low, high


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _solve(
    structure: nnx.GraphDef,
    guide_structure: nnx.GraphDef | None,
    settings: Settings,
    guided: bool,
    record: bool,
    state: nnx.State,
    guide_state: nnx.State | None,
    labels: jax.Array,
    negatives: jax.Array,
    scale: jax.Array,
    noise: jax.Array,
    key: jax.Array,
    indices: jax.Array,
    increments: jax.Array | None,
) -> Solution:
    model = _in_precision(nnx.merge(structure, state), settings.precision)
    guide = None
    if guide_structure is not None and guide_state is not None:
        guide = _in_precision(nnx.merge(guide_structure, guide_state), settings.precision)
    field: Field = model_field(model, labels)
    if guided:
        field = guided_field(model, labels, negatives, scale, settings.guidance_interval, guide)
    if increments is None:
        drawn = noise_increments(key, indices, noise.shape[1:])
        return settings.solver.solve(field, noise, settings.time_grid, settings.steps, drawn, record)
    given = GivenIncrements(increments)
    solution = settings.solver.solve(field, noise, settings.time_grid, settings.steps, given, record)
    if not given.used:
        raise InputError(f"increments are given and {settings.solver!r} adds no noise: choose a stochastic solver.")
    return solution


def _in_precision(model: nnx.Module, precision: str | None) -> ClassConditional:
    if precision is None:
        return cast(ClassConditional, model)
    if not isinstance(model, Castable):
        raise InputError(f"precision={precision!r}: {type(model).__name__} has no astype(dtype); leave precision out.")
    return cast(ClassConditional, model.astype(precision))
