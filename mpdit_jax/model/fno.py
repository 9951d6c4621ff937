r"""The paper's time embedding: a small Fourier neural operator (FNO) on a grid shifted by t (paper, section 3.4).

The output and the gradient grow with the width w, because the paper draws spectral weights with variance 1 at every
width. fno_init="scaled" removes this. docs/fno_width.md has the measurements (`python -m studies.fno_width`).

**Size at initialization.** Let every channel of x (n grid points, w channels) have mean square e, and let the real and
imaginary parts of the complex weights (w, w, modes) have variance s². By Parseval, a spectral convolution of x has mean
square

    (s² / n²) Σ_channels (|X₀|² + 4 Σ_{m ≥ 1} |X_m|²)  <=  2 s² w e,    X = rfft(x),

in every channel, because e = (|X₀|² + 2 Σ_{m ≥ 1} |X_m|²) / n². With the paper's s = 1, three spectral convolutions
multiply the root mean square by up to (2w)^1.5: 181 at w = 16, 11,585 at w = 256.

**No variance repairs both output and gradient.** A linear map of w features h, with independent weights of variance s²,
has an output of size s |h|. An output gradient g gives features a gradient of size s √w |g| and weights one of size
|h| |g|. If the output does not depend on w, the product of these two, (s |h|) √w |g|², grows with w.

**Scaled initialization** draws every weight from N(0, 1) and multiplies each sum of w terms by a constant c: 1/√(2w) in
a spectral convolution, 1/√w in the other maps ("equalized learning rate", Karras et al. 2018). Features keep the size
|h| ~ √w. The feature gradient c √w |g| and the weight gradient c |h| |g| are both ~ |g|, whatever w is.

The final mean over the grid keeps the constant mode alone. Of the last layer's spectral weights, only the real part of
that mode has an effect; the others exist because the published weights have them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer

from mpdit_jax.model.config import FNO_GRID, ModelConfig
from mpdit_jax.model.kernels import at_least_float32
from mpdit_jax.model.linear import XAVIER_UNIFORM, ZEROS, linear

_UNIT = nnx.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True)
class FNOInit:
    """Initializers of the embedding's weights, and the constants that multiply the maps' outputs."""

    lift: Initializer
    pointwise: Initializer
    pointwise_bias: Initializer
    project: Initializer
    spectral_gain: float = 1.0
    linear_gain: float = 1.0  # of the pointwise maps and the projection


def paper_init(width: int) -> FNOInit:
    """Return the published initialization: Xavier linear maps, 1x1 convolutions with PyTorch's default."""
    return FNOInit(XAVIER_UNIFORM, _uniform(width**-0.5), _uniform(width**-0.5), XAVIER_UNIFORM)


def scaled_init(width: int) -> FNOInit:
    """Return the initialization whose output and gradients have the same size at every width (derived above)."""
    return FNOInit(_UNIT, _UNIT, ZEROS, _UNIT, spectral_gain=(2 * width) ** -0.5, linear_gain=width**-0.5)


FNO_INITS: dict[str, Callable[[int], FNOInit]] = {"paper": paper_init, "scaled": scaled_init}


class SpectralConv(nnx.Module):
    """A learned channel mixing of the lowest Fourier modes of (B, grid, width); other modes become zero."""

    def __init__(self, width: int, modes: int, gain: float, rngs: nnx.Rngs) -> None:
        # Two real arrays, so that optimizers, EMA and checkpoints need not handle complex numbers.
        self.real = nnx.Param(_UNIT(rngs.params(), (width, width, modes), jnp.float32))
        self.imaginary = nnx.Param(_UNIT(rngs.params(), (width, width, modes), jnp.float32))
        self.modes, self.gain = modes, gain

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, grid, width) float32 to the same shape; every product is in float32.

        The transforms are products with small matrices. XLA does not split an FFT over the devices of a batch, and on
        GPUs and TPUs one of 32 points is slower than a product.
        """
        forward, inverse = (jnp.asarray(matrix, x.dtype) for matrix in fourier_matrices(x.shape[1], self.modes))
        real, imaginary = self.real[...], self.imaginary[...]  # (in, out, modes)
        # (R + iI)(a + ib) as one real product: (R, I) times ((a, b), (-b, a)).
        columns = [jnp.concatenate(pair, axis=0) for pair in ((real, -imaginary), (imaginary, real))]
        product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        spectrum = product("cmn,bni->bmci", forward, x * self.gain)  # (B, modes, 2, in), real and imaginary parts
        spectrum = spectrum.reshape(*spectrum.shape[:2], -1)  # (B, modes, 2 in)
        mixed = product("bmi,ciom->bmco", spectrum, jnp.stack(columns))  # (B, modes, 2, out)
        return product("cmn,bmco->bno", inverse, mixed)  # (B, grid, out)

    def mean(self, x: jax.Array) -> jax.Array:
        """Return the grid mean of `self(x)`, given the grid mean of x (B, width), which is mode 0 and real."""
        return jnp.matmul(x * self.gain, self.real[..., 0], precision=jax.lax.Precision.HIGHEST)


class FNOLayer(nnx.Module):
    """`SpectralConv(x) + Linear(x)`: a global path and a pointwise path, which is a 1x1 convolution."""

    def __init__(self, width: int, modes: int, init: FNOInit, rngs: nnx.Rngs) -> None:
        self.spectral = SpectralConv(width, modes, init.spectral_gain, rngs)
        self.pointwise = linear(width, width, rngs, kernel_init=init.pointwise, bias_init=init.pointwise_bias)
        self.gain = init.linear_gain

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, grid, width) to the same shape."""
        return self.spectral(x) + self.pointwise(x * self.gain)

    def mean(self, x: jax.Array) -> jax.Array:
        """Return the grid mean of `self(x)`, given the grid mean of x (B, width)."""
        return self.spectral.mean(x) + self.pointwise(x * self.gain)


def fourier_matrices(points: int, modes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrices of the real Fourier transform of `points` numbers and of its inverse, float64.

    Both are (2, modes, points), of the lowest modes' real and imaginary parts: the spectrum of x is
    `forward @ x`, and `np.einsum("cmn,cm->n", inverse, spectrum)` is `irfft` of it, with zeros for the other modes.
    """
    angle = 2 * np.pi / points * np.outer(np.arange(modes), np.arange(points))
    # Each mode stands for itself and its conjugate, except mode 0 and, if `points` is even, the highest mode.
    alone = (np.arange(modes) * 2) % points == 0  # these are real
    forward = np.stack([np.cos(angle), np.where(alone[:, None], 0.0, -np.sin(angle))])  # (2, modes, points)
    return forward, forward * np.where(alone, 1.0, 2.0)[:, None] / points


class FNOTime(nnx.Module):
    """The FNO time embedding: `linspace(-1, 1, 32) + t` is lifted to `fno_width` channels, mixed by FNO layers,
    averaged over the grid, and projected to D.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width, init = config.fno_width, FNO_INITS[config.fno_init](config.fno_width)
        self.lift = linear(1, width, rngs, kernel_init=init.lift)
        self.layers = nnx.List([FNOLayer(width, config.fno_modes, init, rngs) for _ in range(config.fno_layers)])
        self.project = linear(width, config.hidden_size, rngs, kernel_init=init.project)
        self.gain = init.linear_gain

    def __call__(self, t: jax.Array) -> jax.Array:
        """Embed times (B,) in [0, 1] as float32 vectors (B, D)."""
        grid = jnp.asarray(np.linspace(-1.0, 1.0, FNO_GRID, dtype=np.float32))
        x = self.lift((grid[None] + at_least_float32(t)[:, None])[..., None])  # (B, 32, width)
        *inner, last = self.layers
        for layer in inner:
            x = jax.nn.gelu(layer(x), approximate=False)
        # Averaging over the grid before the last layer gives the same values, and gradients of exactly zero for weights
        # of that layer's other modes, which have no effect.
        return self.project(last.mean(x.mean(axis=1)) * self.gain)  # (B, D)


def _uniform(bound: float) -> Initializer:
    """Return an initializer that draws uniformly from [-bound, bound)."""
    draw = nnx.initializers.uniform(2 * bound)  # in [0, 2 bound)
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: draw(key, shape, dtype) - bound
