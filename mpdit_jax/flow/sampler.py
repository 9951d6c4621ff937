"""From labels to latents in one jitted call."""

import dataclasses
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.flow.guidance import classifier_free, conditional
from mpdit_jax.flow.protocols import ClassConditional
from mpdit_jax.flow.solvers import Solver, find_solver, uniform_times


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws latents from a model; made by `make_sampler`. Compiles once for each batch shape and model structure."""

    solver: Solver
    steps: int
    guidance_scale: float

    def __call__(
        self, model: nnx.Module, labels: jax.typing.ArrayLike, key: jax.Array, noise: jax.Array | None = None
    ) -> jax.Array:
        """Draw one latent for each label.

        Args:
            model: an MPDiT, or any NNX module with its call signature, `input_shape` and `num_classes`.
            labels: int (B,), each in [0, num_classes].
            key: a JAX random key. Image i depends on (key, i, labels[i]) and the settings alone, not on B.
            noise: starting noise (B, H, W, C) in place of what `key` gives.

        Returns:
            Latents float32 (B, H, W, C).

        Raises:
            InputError: a label the model does not have, or noise of another shape.
        """
        target = cast(ClassConditional, model)
        labels = check_labels(labels, target.num_classes)
        shape = (labels.shape[0], *target.input_shape)
        if noise is None:
            noise = draw_noise(key, jnp.arange(labels.shape[0]), target.input_shape)
        elif noise.shape != shape:
            raise InputError(f"noise {noise.shape}: expected {shape}, one latent for each of {shape[0]} labels.")
        structure, state = nnx.split(model)
        guided = self.guidance_scale != 1.0
        return _sample(structure, self.solver, self.steps, guided, state, labels, noise, self.guidance_scale)


def make_sampler(solver: str | Solver = "euler", steps: int = 250, guidance_scale: float = 1.0) -> Sampler:
    """A sampling function `sampler(model, labels, key, noise=None) -> latents`, jitted once for each shape.

    Args:
        solver: a name or a `Solver`.
        steps: velocity evaluations; 250 means 250.
        guidance_scale: w in v_null + w (v_class - v_null); 1.0 is the conditional model and costs no second pass.

    Raises:
        ConfigError: unknown solver, steps below 1, or a negative guidance scale.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps={steps!r}: expected a whole number of velocity evaluations, 1 or more.")
    if not guidance_scale >= 0 or guidance_scale == float("inf"):
        raise ConfigError(f"guidance_scale={guidance_scale!r}: expected 0 or more (1.0 is no guidance).")
    return Sampler(find_solver(solver), steps, float(guidance_scale))


def draw_noise(key: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise (n, *shape) of the images numbered `indices` (n,): a function of (key, index) alone."""
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape))(indices)


def check_labels(labels: jax.typing.ArrayLike, num_classes: int) -> jax.Array:
    """Labels as int32 (B,). Values are checked unless they are being traced.

    Raises:
        InputError: not a vector of whole numbers, or a label outside [0, num_classes].
    """
    if not isinstance(labels, jax.core.Tracer):
        values = np.asarray(labels)
        if values.ndim != 1 or not (np.issubdtype(values.dtype, np.integer)):
            raise InputError(f"labels of shape {values.shape}, dtype {values.dtype}: expected whole numbers (B,).")
        bad = values[(values < 0) | (values > num_classes)]
        if bad.size:
            raise InputError(
                f"label {bad[0]} is out of range: this model has classes 0 to {num_classes - 1} "
                f"(and {num_classes}, the null class)."
            )
    return jnp.asarray(labels, jnp.int32)


@partial(jax.jit, static_argnames=("structure", "solver", "steps", "guided"))
def _sample(
    structure: nnx.GraphDef,
    solver: Solver,
    steps: int,
    guided: bool,
    state: nnx.State,
    labels: jax.Array,
    noise: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    model = cast(ClassConditional, nnx.merge(structure, state))
    field = classifier_free(model, labels, scale) if guided else conditional(model, labels)
    return solver.solve(field, noise.astype(jnp.float32), uniform_times(steps))
