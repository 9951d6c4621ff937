"""The model's linear layer: Flax's, with the paper's initialization and one rule about precision."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

XAVIER_UNIFORM: Initializer = nnx.initializers.xavier_uniform()
ZEROS: Initializer = nnx.initializers.zeros_init()


def linear(
    inputs: int,
    outputs: int,
    rngs: nnx.Rngs,
    *,
    dtype: str = "float32",
    kernel_init: Initializer = XAVIER_UNIFORM,
    bias_init: Initializer = ZEROS,
) -> nnx.Linear:
    """A linear map (..., inputs) to (..., outputs) with float32 parameters that computes in `dtype`.

    float32 means float32: precision "highest" keeps TPUs and GPUs from rounding the operands to bfloat16 or TF32. With
    bfloat16 operands the setting has no effect.
    """
    return nnx.Linear(
        inputs,
        outputs,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
        kernel_init=kernel_init,
        bias_init=bias_init,
        rngs=rngs,
    )
