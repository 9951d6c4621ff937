"""Layers of convolutional networks for inference; batch norm is folded into the convolution before it."""

from collections.abc import Mapping, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpdit_jax.errors import WeightsError

Padding = str | tuple[tuple[int, int], tuple[int, int]]


class Conv(nnx.Module):
    """Convolution with `kernel` (height, width, inputs / groups, outputs) and `bias` (outputs,), without activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: Padding = "SAME",
        groups: int = 1,
    ):
        height, width = (size, size) if isinstance(size, int) else size
        self.kernel = nnx.Param(jnp.zeros((height, width, inputs // groups, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.stride, self.padding, self.groups = stride, padding, groups

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, inputs) to (B, H', W', outputs), in true float32 on every device."""
        stride, layout, exact = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC"), jax.lax.Precision.HIGHEST
        return self.bias[None, None, None] + jax.lax.conv_general_dilated(
            x, self.kernel[...], stride, self.padding, None, None, layout, self.groups, precision=exact
        )


def pointwise(x: jax.Array, convolutions: Sequence[Conv]) -> list[jax.Array]:
    """Apply several 1x1 convolutions to one input in one matrix product."""
    kernel = jnp.concatenate([conv.kernel[0, 0] for conv in convolutions], axis=1)  # (inputs, all outputs)
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, precision=jax.lax.Precision.HIGHEST)  # (B·H·W, all outputs)
    flat += jnp.concatenate([conv.bias[...] for conv in convolutions])[None]
    ends = np.cumsum([conv.bias.shape[0] for conv in convolutions])[:-1]
    return jnp.split(flat.reshape(*x.shape[:-1], -1), ends, axis=-1)


def average_pool(x: jax.Array) -> jax.Array:
    """Return 3x3 means at every position, without the padding at the border."""
    sums = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    rows, columns = (np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3])
    return sums / np.outer(rows, columns).astype(np.float32)[None, :, :, None]


def max_pool(x: jax.Array, stride: int, padding: str) -> jax.Array:
    """Return 3x3 maxima."""
    return jax.lax.platform_dependent(
        x,
        cpu=partial(_max_of_slices, stride=stride, padding=padding),
        default=partial(_max_of_windows, stride=stride, padding=padding),
    )


def _max_of_windows(x: jax.Array, stride: int, padding: str) -> jax.Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _max_of_slices(x: jax.Array, stride: int, padding: str) -> jax.Array:
    """Return the same maxima, faster on CPUs: XLA vectorizes slices and not windows."""
    for axis in (1, 2):
        pads = jax.lax.padtype_to_pads((x.shape[axis],), (3,), (stride,), padding)
        x = jnp.pad(x, [pads[0] if each == axis else (0, 0) for each in range(4)], constant_values=-jnp.inf)
        last = x.shape[axis] - 2  # where the last window may begin, plus 1
        taps = [jax.lax.slice_in_dim(x, n, last + n, stride, axis) for n in range(3)]
        x = reduce(jnp.maximum, taps)
    return x


def fold(
    state: Mapping[str, np.ndarray], conv: str, norm: str, epsilon: float, source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Fold a bias-free PyTorch convolution and its batch norm: kernel (height, width, in, out) and bias (out,).

    `source` names the state in errors. Raises WeightsError if an entry is missing, misshapen or not finite.
    """
    kernel = entry(state, f"{conv}.weight", source, 4)
    scale, shift, mean, variance = (
        entry(state, f"{norm}.{part}", source, 1) for part in ("weight", "bias", "running_mean", "running_var")
    )
    if any(part.shape != kernel.shape[:1] for part in (scale, shift, mean, variance)) or variance.min() < 0:
        raise WeightsError(f"{source}: {norm} does not fit {conv}: expected {kernel.shape[0]} values in each entry.")
    factor = scale / np.sqrt(variance + epsilon)
    return (kernel * factor[:, None, None, None]).transpose(2, 3, 1, 0), shift - mean * factor


def entry(state: Mapping[str, np.ndarray], name: str, source: str, dimensions: int) -> np.ndarray:
    """Return an array of a state as float64; raises WeightsError if it is missing, misshapen or not finite."""
    if name not in state:
        raise WeightsError(f"{source}: entry {name} is missing; expected all weights of this network.")
    array = np.asarray(state[name], np.float64)
    if array.ndim != dimensions or not np.isfinite(array).all():
        raise WeightsError(f"{source}: entry {name} {array.shape} holds NaN, or is not of {dimensions} dimensions.")
    return array


def assign(module: nnx.Module, arrays: Mapping[str, np.ndarray], source: str) -> None:
    """Put arrays into a module's parameters, by dotted path; raises WeightsError unless they fit one to one."""
    state = nnx.state(module, nnx.Param)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    if missing := sorted(flat.keys() ^ arrays.keys()):
        raise WeightsError(f"{source}: {missing[0]} has no counterpart: expected the weights of another network.")
    for path, leaf in flat.items():
        if leaf[...].shape != arrays[path].shape:
            raise WeightsError(f"{source}: {path} is {arrays[path].shape}: expected {leaf[...].shape}.")
        leaf[...] = jnp.asarray(arrays[path], jnp.float32)
    nnx.update(module, state)
