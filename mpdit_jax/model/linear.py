"""The model's linear layer: `nnx.Linear` with the paper's initialization and one precision rule."""

from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from mpdit_jax.model.kernels import at_least_float32, operand_precision, product_dtype

ArraysT = TypeVar("ArraysT", bound=tuple[Any, ...])  # the arrays of flax's PromoteDtypeFn

XAVIER_UNIFORM: Initializer = nnx.initializers.xavier_uniform()
ZEROS: Initializer = nnx.initializers.zeros_init()
NORMAL_002: Initializer = nnx.initializers.normal(0.02)


def linear(
    inputs: int,
    outputs: int,
    rngs: nnx.Rngs,
    *,
    dtype: str = "float32",
    platform: str = "auto",
    kernel_init: Initializer = XAVIER_UNIFORM,
    bias_init: Initializer = ZEROS,
) -> nnx.Linear:
    """Build a linear map (..., inputs) to (..., outputs) with float32 parameters that computes in `dtype`.

    Products are as precise as `kernels.operand_precision` says. In bfloat16, the result is bfloat16, or float32 on
    platforms where that is faster (`kernels.product_dtype`).
    """
    return nnx.Linear(
        inputs,
        outputs,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.float32,
        dot_general=flat_dot_general,
        preferred_element_type=product_dtype(platform),
        promote_dtype=operands if product_dtype(platform) is None else operands_of_a_wide_product,
        kernel_init=kernel_init,
        bias_init=bias_init,
        rngs=rngs,
    )


def operands(arrays: ArraysT, /, *, dtype: Any = None, inexact: bool = True) -> ArraysT:
    """Convert inputs, kernel and bias to the compute dtype."""
    return cast(ArraysT, tuple(array.astype(dtype) for array in arrays))


def operands_of_a_wide_product(arrays: ArraysT, /, *, dtype: Any = None, inexact: bool = True) -> ArraysT:
    """Convert as `operands` does, then cast the rounded bias to float32, the dtype of the product it is added to."""
    inputs, kernel, bias = operands(arrays, dtype=dtype)
    return cast(ArraysT, (inputs, kernel, at_least_float32(bias)))


def flat_dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """Compute `x @ kernel` as a product of two matrices: x (B, T, in) is reshaped to (B * T, in).

    The values are those of `jax.lax.dot_general`. The weight gradient then contracts one axis instead of two, which is
    several times faster on XLA's CPU backend; on TPUs and GPUs XLA merges the axes itself.
    """
    options["precision"] = operand_precision(x.dtype)
    outputs = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return outputs.reshape(*x.shape[:-1], kernel.shape[-1])
