"""Small models and fields for tests of the flow."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import register_dataclass

from mpdit_jax.flow.fields import Field

MEAN = jnp.array([0.5, -0.3, 0.2, 0.0])
COVARIANCE = jnp.array([[1.0, 0.5, 0.0, 0.1], [0.5, 0.8, 0.2, 0.0], [0.0, 0.2, 0.5, -0.1], [0.1, 0.0, -0.1, 0.3]])


@register_dataclass
@dataclasses.dataclass(frozen=True)
class FunctionField(Field):
    """The field of a function (z, t), with t of shape (1,) or (B,)."""

    function: Callable[[jax.Array, jax.Array], jax.Array] = dataclasses.field(metadata={"static": True})

    def prepare(self, times):
        return times

    def __call__(self, z, prepared):
        return self.function(z, prepared)


def gaussian_velocity(z, t, mean=MEAN, covariance=COVARIANCE):
    """E[n - x | (1 - t) x + t n = z] for x ~ N(mean, covariance); z (B, 1, 1, 4), t (B,) or (1,)."""
    t = jnp.broadcast_to(t, z.shape[:1])[:, None, None]  # (B, 1, 1)
    total = (1 - t) ** 2 * covariance + t**2 * jnp.eye(4)  # covariance of z_t
    residual = jnp.linalg.solve(total, (z[:, 0, 0] - (1 - t[..., 0]) * mean)[..., None])  # (B, 4, 1)
    data = mean + ((1 - t) * (covariance @ residual))[..., 0]
    noise = (t * residual)[..., 0]
    return (noise - data)[:, None, None]


class GaussianModel(nnx.Module):
    """The exact velocity of Gaussian data, whose mean class y shifts by y. It has the call signature alone."""

    input_shape = (1, 1, 4)
    num_classes = 3

    def __call__(self, x, t, y):
        shift = y.astype(jnp.float32)[:, None]
        return jax.vmap(lambda x, t, s: gaussian_velocity(x[None], t[None], MEAN + s)[0])(x, t, shift)


def counting_model():
    """Return a model whose velocity is label / 10, and a list to which every evaluation appends its times (B,)."""
    seen = []

    class CountingModel(nnx.Module):
        input_shape = (1, 1, 1)
        num_classes = 10

        def __call__(self, x, t, y):
            jax.debug.callback(lambda t: seen.append(t), t)
            return jnp.broadcast_to(y.astype(jnp.float32)[:, None, None, None] / 10, x.shape)

    return CountingModel(), seen


def tiny_model(**fields):
    """Build an MPDiT with random nonzero weights, drawn by NumPy to avoid compilation."""
    from mpdit_jax.model.parameters import abstract, merge
    from mpdit_jax.model.presets import preset_config

    small = {"hidden_size": 32, "num_heads": 2, "num_classes": 10, "input_size": 8, "class_tokens": 2, "depths": (1, 1)}
    # The sinusoidal embedding: a random FNO is so rough in t that rounding decides where adaptive solvers step.
    small |= {"in_channels": 1, "time_embedding": "sinusoidal"}
    structure, shapes = abstract(preset_config("mpdit_b", **{**small, **fields}))
    random = np.random.default_rng(0)
    return merge(structure, {k: jnp.asarray(0.1 * random.standard_normal(v.shape), v.dtype) for k, v in shapes.items()})


def in_float64(model):
    """Return the model with float64 parameters and arithmetic; call its parts under `jax.enable_x64(True)`."""
    from mpdit_jax.model.kernels import HeadByHead

    model = nnx.merge(nnx.graphdef(model), jax.tree.map(lambda leaf: leaf.astype(jnp.float64), nnx.state(model)))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            module.dtype = module.param_dtype = jnp.float64
            module.preferred_element_type = None
        if hasattr(module, "attend"):
            module.attend = HeadByHead("float64")
    model.class_embedding.dtype = "float64"
    return model
