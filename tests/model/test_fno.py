"""The FNO time embedding's Fourier transforms, which are products with matrices."""

import jax
import numpy as np
import pytest
from flax import nnx

from mpdit_jax.model.fno import SpectralConv, fourier_matrices
from tests.conftest import relative_error


@pytest.mark.parametrize(("points", "modes"), [(32, 16), (32, 17), (32, 1), (31, 16)])
def test_matrices_are_numpys_transforms(points, modes):
    forward, inverse = fourier_matrices(points, modes)
    random = np.random.default_rng(0)
    x, spectrum = random.standard_normal(points), random.standard_normal((2, modes))
    np.testing.assert_allclose(forward[0] @ x + 1j * (forward[1] @ x), np.fft.rfft(x)[:modes], atol=1e-13)
    # irfft ignores imaginary parts of modes that are real, as the matrix does.
    expected = np.fft.irfft(spectrum[0] + 1j * spectrum[1], n=points)
    np.testing.assert_allclose(np.einsum("cmn,cm->n", inverse, spectrum), expected, atol=1e-15)


@pytest.mark.parametrize("modes", [16, 17])
def test_spectral_convolution_and_its_mean(modes):
    convolution = SpectralConv(4, modes, 0.5, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (3, 32, 4))
    weights = np.asarray(convolution.real[...], np.float64) + 1j * np.asarray(convolution.imaginary[...])
    spectrum = np.fft.rfft(np.asarray(x, np.float64) * 0.5, axis=1)[:, :modes]
    expected = np.fft.irfft(np.einsum("bmi,iom->bmo", spectrum, weights), n=32, axis=1)
    assert relative_error(convolution(x), expected) < 1e-6
    assert relative_error(convolution.mean(x.mean(axis=1)), expected.mean(axis=1)) < 1e-6
