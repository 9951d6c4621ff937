"""The paper's time embedding: a small Fourier neural operator on a grid shifted by t (paper, section 3.4)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer

from mpdit_jax.model.config import FNO_GRID, ModelConfig
from mpdit_jax.model.linear import linear


class SpectralConv(nnx.Module):
    """Mix the channels of the lowest Fourier modes of (B, grid, width) by learned matrices; other modes become zero."""

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
        # PyTorch's default for a convolution, weight and bias.
        uniform = _uniform(width**-0.5)
        self.pointwise = linear(width, width, rngs, kernel_init=uniform, bias_init=uniform)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, grid, width) to the same."""
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
        grid = jnp.asarray(np.linspace(-1.0, 1.0, FNO_GRID, dtype=np.float32))
        x = self.lift((grid + t.astype(jnp.float32)[:, None])[..., None])  # (B, 32, width)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index < len(self.layers) - 1:
                x = jax.nn.gelu(x, approximate=False)
        return self.project(x.mean(axis=1))  # (B, D)


def _uniform(bound: float) -> Initializer:
    """Uniform in ±bound."""
    draw = nnx.initializers.uniform(2 * bound)  # in [0, 2 bound)
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: draw(key, shape, dtype) - bound
