"""The paper's time embedding: a small Fourier neural operator on a grid shifted by t (paper, section 3.4)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpdit_jax.model.config import FNO_GRID, ModelConfig
from mpdit_jax.model.linear import linear


class SpectralConv(nnx.Module):
    """Multiply the lowest Fourier modes of (B, grid, width) by learned complex matrices; the other modes become zero."""

    def __init__(self, width: int, modes: int, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(1.0)
        # Two real arrays: optimizers, EMA and checkpoints then never meet a complex number.
        self.real = nnx.Param(normal(rngs.params(), (width, width, modes), jnp.float32))
        self.imaginary = nnx.Param(normal(rngs.params(), (width, width, modes), jnp.float32))
        self.modes = modes

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, grid, width) float32 to the same; FFT and product in float32 and complex64."""
        spectrum = jnp.fft.rfft(x, axis=1)[:, : self.modes]  # (B, modes, width)
        weights = jax.lax.complex(self.real[...], self.imaginary[...])  # (in, out, modes)
        mixed = jnp.einsum("bmi,iom->bmo", spectrum, weights, precision=jax.lax.Precision.HIGHEST)
        return jnp.fft.irfft(mixed, n=x.shape[1], axis=1)  # (B, grid, width); irfft pads the missing modes with zeros


class FNOLayer(nnx.Module):
    """`SpectralConv(x) + Linear(x)`: a global and a pointwise path. The pointwise path is a 1x1 convolution."""

    def __init__(self, width: int, modes: int, rngs: nnx.Rngs) -> None:
        self.spectral = SpectralConv(width, modes, rngs)
        self.pointwise = linear(
            width, width, rngs, kernel_init=_uniform_one_over_root_width, bias_init=_uniform_one_over_root_width
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.spectral(x) + self.pointwise(x)


class FNOTime(nnx.Module):
    """Time embedding: `linspace(-1, 1, 32) + t`, lifted to `fno_width` channels, mixed, averaged, mapped to D."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width = config.fno_width
        self.lift = linear(1, width, rngs)
        self.layers = nnx.List([FNOLayer(width, config.fno_modes, rngs) for _ in range(config.fno_layers)])
        self.project = linear(width, config.hidden_size, rngs)

    def __call__(self, t: jax.Array) -> jax.Array:
        """Time vectors (B, D) float32 of times (B,) in [0, 1]."""
        grid = np.linspace(-1.0, 1.0, FNO_GRID, dtype=np.float32)
        x = self.lift((grid + t.astype(jnp.float32)[:, None])[..., None])  # (B, 32, width)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index < len(self.layers) - 1:
                x = jax.nn.gelu(x, approximate=False)
        return self.project(x.mean(axis=1))  # (B, D)


def _uniform_one_over_root_width(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> jax.Array:
    """PyTorch's default for a convolution of fan-in w: uniform in ±1/√w, for the weight and for the bias."""
    bound = shape[-1] ** -0.5  # width in equals width out, so a bias of shape (w,) knows its fan-in too
    return jax.random.uniform(key, shape, dtype, -bound, bound)
