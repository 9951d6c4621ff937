r"""The paper's time embedding: a small Fourier neural operator on a grid shifted by t (paper, section 3.4).

**How large it is at the start.** Let every channel of x (grid of n points, w channels) have mean square e. By
Parseval, irfft of the product of rfft(x) with complex weights (w, w, modes), whose real and imaginary parts have
variance s², has in every channel the mean square

    (s² / n²) Σ_channels (|X₀|² + 4 Σ_{m ≥ 1} |X_m|²)  <=  2 s² w e,    X = rfft(x),

for e is (|X₀|² + 2 Σ_{m ≥ 1} |X_m|²) / n² of a channel: rfft gives one of each pair of modes. Equality is where the
modes that are kept hold everything and there is no constant mode (its product is cut to its real part). With the
paper's s = 1 each spectral convolution multiplies the root mean square by up to √(2w), three of them by (2w)^1.5: 181
at w = 16, 11,585 at w = 256. Gradients grow as the weights they pass through, and again with the features that they are
multiplied by.

**Why no variance repairs both.** Take a linear map of w features h with independent weights of variance s². Its output
has the size s |h|. A gradient g of the output, independent of the weights, gives the features the gradient s √w |g| and
the weights |h| |g|. With an output that does not depend on w, the product of the two is (s |h|) √w |g|²: one of them
grows with w.

**The scaling.** fno_init="scaled" draws every weight from N(0, 1) and multiplies each sum of w terms by a constant c,
1/√(2w) in a spectral convolution and 1/√w in the other maps ("equalized learning rate", Karras et al. 2018). Features
keep their size, |h| ~ √w in all, as by weights of variance c². The gradient of all features is c √w |g| ~ |g|, and that
of the weights has the constant as a factor as well: c |h| |g| ~ |g|. Neither depends on w.
`python -m studies.fno_width` measures it (docs/fno_width.md).

The mean over the grid at the end is the constant mode, so that of the last layer's spectral weights only the real part
of that mode matters. The others are kept as published.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer

from mpdit_jax.model.config import FNO_GRID, ModelConfig
from mpdit_jax.model.linear import XAVIER_UNIFORM, ZEROS, linear

_UNIT = nnx.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True)
class FNOInit:
    """How the weights are drawn, and the constants that multiply their maps."""

    lift: Initializer
    pointwise: Initializer
    pointwise_bias: Initializer
    project: Initializer
    spectral_gain: float = 1.0
    linear_gain: float = 1.0  # of the pointwise maps and the projection


def paper_init(width: int) -> FNOInit:
    """The published code's: linear maps Xavier, the 1x1 convolutions PyTorch's default."""
    return FNOInit(XAVIER_UNIFORM, _uniform(width**-0.5), _uniform(width**-0.5), XAVIER_UNIFORM)


def scaled_init(width: int) -> FNOInit:
    """Output and gradients of the same size at every width; derived above."""
    return FNOInit(_UNIT, _UNIT, ZEROS, _UNIT, spectral_gain=(2 * width) ** -0.5, linear_gain=width**-0.5)


FNO_INITS: dict[str, Callable[[int], FNOInit]] = {"paper": paper_init, "scaled": scaled_init}


class SpectralConv(nnx.Module):
    """Mix the channels of the lowest Fourier modes of (B, grid, width) by learned matrices; other modes become zero."""

    def __init__(self, width: int, modes: int, gain: float, rngs: nnx.Rngs) -> None:
        # Two real arrays: optimizers, EMA and checkpoints then never meet a complex number.
        self.real = nnx.Param(_UNIT(rngs.params(), (width, width, modes), jnp.float32))
        self.imaginary = nnx.Param(_UNIT(rngs.params(), (width, width, modes), jnp.float32))
        self.modes, self.gain = modes, gain

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, grid, width) float32 to the same; FFT and product in float32 and complex64."""
        spectrum = jnp.fft.rfft(x * self.gain, axis=1)[:, : self.modes]  # (B, modes, width)
        weights = jax.lax.complex(self.real[...], self.imaginary[...])  # (in, out, modes)
        mixed = jnp.einsum("bmi,iom->bmo", spectrum, weights, precision=jax.lax.Precision.HIGHEST)
        return jnp.fft.irfft(mixed, n=x.shape[1], axis=1)  # (B, grid, width); irfft pads the missing modes with zeros


class FNOLayer(nnx.Module):
    """`SpectralConv(x) + Linear(x)`: a global and a pointwise path. The pointwise path is a 1x1 convolution."""

    def __init__(self, width: int, modes: int, init: FNOInit, rngs: nnx.Rngs) -> None:
        self.spectral = SpectralConv(width, modes, init.spectral_gain, rngs)
        self.pointwise = linear(width, width, rngs, kernel_init=init.pointwise, bias_init=init.pointwise_bias)
        self.gain = init.linear_gain

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, grid, width) to the same."""
        return self.spectral(x) + self.pointwise(x * self.gain)


class FNOTime(nnx.Module):
    """Time embedding: `linspace(-1, 1, 32) + t`, lifted to `fno_width` channels, mixed, averaged, mapped to D."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, init = config.fno_width, FNO_INITS[config.fno_init](config.fno_width)
        self.lift = linear(1, width, rngs, kernel_init=init.lift)
        self.layers = nnx.List([FNOLayer(width, config.fno_modes, init, rngs) for _ in range(config.fno_layers)])
        self.project = linear(width, config.hidden_size, rngs, kernel_init=init.project)
        self.gain = init.linear_gain

    def __call__(self, t: jax.Array) -> jax.Array:
        """Time vectors (B, D) float32 of times (B,) in [0, 1]."""
        grid = jnp.asarray(np.linspace(-1.0, 1.0, FNO_GRID, dtype=np.float32))
        x = self.lift((grid + t.astype(jnp.float32)[:, None])[..., None])  # (B, 32, width)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index < len(self.layers) - 1:
                x = jax.nn.gelu(x, approximate=False)
        return self.project(x.mean(axis=1) * self.gain)  # (B, D)


def _uniform(bound: float) -> Initializer:
    """Uniform in ±bound."""
    draw = nnx.initializers.uniform(2 * bound)  # in [0, 2 bound)
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: draw(key, shape, dtype) - bound
