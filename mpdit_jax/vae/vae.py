"""`load_vae` and `VAE`: a trained VAE with checked inputs and compiled functions, on one device or a mesh."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from mpdit_jax.distributed.mesh import AXES, batch_sharding, replicated
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.model.parameters import Parameters, merge
from mpdit_jax.vae.autoencoder import mean_and_std
from mpdit_jax.vae.config import AutoencoderConfig
from mpdit_jax.vae.hub import locate
from mpdit_jax.vae.tiling import Tiling, apply_tiled
from mpdit_jax.vae.weights import abstract, fingerprint, load_folder
from mpdit_jax.validation import layout_remedy

DTYPES = ("float32", "bfloat16")
NO_VAE = "none"
"""The name of `load_vae(None)`, pixel space, in commands and configs."""
PIXELS = "pixels"
"""The fingerprint of pixel space."""


def load_vae(
    source: str | Path | None, *, dtype: str = "float32", mesh: Mesh | None = None, tiling: Tiling | None = None
) -> "VAE":
    """Load a Stable Diffusion AutoencoderKL.

    Args:
        source: a folder written by diffusers (`config.json`, `diffusion_pytorch_model.safetensors`), or a hub name
            such as "stabilityai/sd-vae-ft-ema" or "owner/pipeline/vae" (needs the extra [hub]). None or "none" is pixel
            space, where RGB images are their own latents.
        dtype: compute dtype, "float32" or "bfloat16"; parameters stay float32.
        mesh: a mesh from `mpdit_jax.distributed.mesh.make_mesh`; batches are split over its axes `data` and `fsdp`,
            parameters replicated. Default: one device.
        tiling: cut images larger than a tile into overlapping tiles. Default: no tiles.

    Raises:
        WeightsError: files or entries are missing, extra, misshapen or damaged.
        ConfigError: an unsupported `config.json`, dtype, mesh or tiling.
        MissingExtraError: a hub name needs [hub], a `.bin` file [torch].
    """
    if source is None or source == NO_VAE:
        return PixelSpace(mesh=mesh)
    config, parameters = load_folder(locate(source))
    return VAE(config, parameters, dtype=dtype, mesh=mesh, tiling=tiling)


class VAE:
    """A VAE that encodes images in [-1, 1] and decodes latents; created by `load_vae`.

    Latents are unscaled: the caller applies `(latents - shift_factor) * scaling_factor`, for about unit variance.

    Attributes:
        config: the architecture.
        dtype: compute dtype.
        mesh: the mesh that batches are split over, or None.
        tiling: the tiling of large images, or None.
        parameters: flat dict from dotted path to float32 array.
        downsample_factor: image pixels per latent pixel, along height and along width.
        latent_channels: channels of the latents.
        scaling_factor, shift_factor: see above; a checkpoint without a shift_factor has 0.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        parameters: Mapping[str, Any],
        *,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        tiling: Tiling | None = None,
    ):
        if dtype not in DTYPES:
            raise ConfigError(f"VAE dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
        if mesh is not None and not set(AXES) <= set(mesh.axis_names):
            raise ConfigError(
                f"VAE mesh has the axes {', '.join(mesh.axis_names)}: expected {' and '.join(AXES)}; use "
                "mpdit_jax.distributed.mesh.make_mesh()."
            )
        if tiling is not None:
            tiling.check(config.downsample_factor)
        self._describe(config, dtype, mesh, tiling)
        self.parameters: Parameters = dict(jax.device_put(dict(parameters), replicated(mesh) if mesh else None))
        structure = abstract(config, dtype)[0]
        factor = config.downsample_factor

        def encode(parameters: Parameters, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return mean_and_std(self._tiled(merge(structure, parameters).moments, x, units=(factor, 1)))

        def decode(parameters: Parameters, z: jax.Array) -> jax.Array:
            return self._tiled(merge(structure, parameters).decode, z, units=(1, factor))

        self._encode, self._decode = self._compile(encode), self._compile(decode)

    def _describe(self, config: AutoencoderConfig, dtype: str, mesh: Mesh | None, tiling: Tiling | None) -> None:
        self.config, self.dtype, self.mesh, self.tiling = config, dtype, mesh, tiling
        self.downsample_factor, self.latent_channels = config.downsample_factor, config.latent_channels
        self.scaling_factor, self.shift_factor = config.scaling_factor, config.shift_factor or 0.0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, the same for every file format (`mpdit_jax.vae.weights.fingerprint`)."""
        return fingerprint(self.parameters)

    def encode(self, images: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Return the mean and standard deviation of the latents' posterior.

        Args:
            images: (B, H, W, in_channels) floating point in [-1, 1]; H and W multiples of the downsample factor f. On a
                mesh, B is a multiple of its size; with several processes, `images` is a global array or the same host
                array in every process. The values of host arrays are checked. The values of arrays on a device are not
                checked, to avoid waiting for them; a NaN affects its own image only.

        Returns:
            Two float32 arrays (B, H/f, W/f, latent_channels). The log variance is clipped to [-30, 20] first.

        Raises:
            InputError: wrong shape, dtype or range.
        """
        factor, shape = self.downsample_factor, np.shape(images)
        images = self._check(images, "images", self.config.in_channels, "images.astype(np.float32) / 127.5 - 1")
        if shape[1] % factor or shape[2] % factor:
            raise InputError(
                f"images are {shape[1]}x{shape[2]}: expected height and width to be multiples of the VAE's downsample "
                f"factor {factor}; crop or resize them."
            )
        if isinstance(images, np.ndarray) and np.abs(images).max() > 1.01:  # 0.01 for rounding
            raise InputError(
                f"images range from {images.min():.3g} to {images.max():.3g}: expected [-1, 1]; rescale them, such as "
                "by images / 127.5 - 1 from 0…255."
            )
        mean, std = self._encode(self.parameters, self._place(images))
        return mean, std

    def decode(self, latents: ArrayLike, *, clip: bool = True) -> jax.Array:
        """Decode latents to images.

        Args:
            latents: (B, h, w, latent_channels) floating point, unscaled; on a mesh as in `encode`.
            clip: clip the images to [-1, 1], which the network's output slightly exceeds. Use False for gradients and
                for comparison with diffusers' `decode(...).sample`.

        Returns:
            (B, h·f, w·f, out_channels) float32.

        Raises:
            InputError: wrong shape or dtype, or a host array that is not finite.
        """
        latents = self._check(latents, "latents", self.latent_channels, "latents.astype(np.float32)")
        images = self._decode(self.parameters, self._place(latents))
        return jnp.clip(images, -1.0, 1.0) if clip else images

    def _tiled(self, function: Callable[[jax.Array], jax.Array], x: jax.Array, units: tuple[int, int]) -> jax.Array:
        if self.tiling is None:
            return function(x)
        factor = self.downsample_factor
        tile, overlap = self.tiling.size // factor, self.tiling.overlap // factor
        return apply_tiled(function, x, tile=tile, overlap=overlap, units=units)

    def _compile(self, function: Callable[[Parameters, jax.Array], Any]) -> Callable[[Parameters, jax.Array], Any]:
        if self.mesh is None:
            return jax.jit(function)
        # With shard_map every device runs the whole network on its own images; jit might partition it differently.
        batch = PartitionSpec(AXES)
        return jax.jit(
            jax.shard_map(function, mesh=self.mesh, in_specs=(PartitionSpec(), batch), out_specs=batch, check_vma=False)
        )

    def _place(self, x: np.ndarray | jax.Array) -> jax.Array:
        return jnp.asarray(x) if self.mesh is None else jax.device_put(x, batch_sharding(self.mesh))

    def _check(self, x: ArrayLike, name: str, channels: int, conversion: str) -> np.ndarray | jax.Array:
        """Return the array as float32, on host or device as before. Raise InputError if it is not valid."""
        array = x if isinstance(x, jax.Array) else np.asarray(x)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{name} have dtype {array.dtype}: expected floating point; convert by {conversion}.")
        if array.ndim != 4 or array.shape[3] != channels or 0 in array.shape:
            raise InputError(
                f"{name} have shape {array.shape}: expected (batch, height, width, {channels}), channels last"
                f"{layout_remedy(array.shape, name)}."
            )
        if self.mesh is not None and array.shape[0] % self.mesh.size:
            raise InputError(
                f"{name} have batch size {array.shape[0]}, which does not divide over {self.mesh.size} devices: pad it "
                f"to {-(-array.shape[0] // self.mesh.size) * self.mesh.size}."
            )
        array = array.astype(jnp.float32)
        if isinstance(array, np.ndarray) and not np.isfinite(array).all():
            bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
            raise InputError(
                f"{name} hold NaN or infinity at batch index {bad[0]} ({len(bad)} in all): drop or fix them."
            )
        return array


class PixelSpace(VAE):
    """Pixel space as a VAE: latents are the RGB images in [-1, 1], with standard deviation 0."""

    def __init__(self, *, mesh: Mesh | None = None):
        # One resolution makes downsample_factor 1.
        config = AutoencoderConfig(block_out_channels=(1,), norm_num_groups=1, latent_channels=3, scaling_factor=1.0)
        self._describe(config, "float32", mesh, None)
        self.parameters = {}
        self._encode = self._compile(lambda _, images: (images, jnp.zeros_like(images)))
        self._decode = self._compile(lambda _, latents: latents)

    @cached_property
    def fingerprint(self) -> str:
        """`PIXELS`."""
        return PIXELS
