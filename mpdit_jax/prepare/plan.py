"""The settings of a store, and what follows from them."""

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np

from mpdit_jax.data.picture_sets import Pictures, key_bytes_of
from mpdit_jax.errors import InputError
from mpdit_jax.vae import VAE


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings of a store that is to be made."""

    images: Pictures  # squares as the VAE takes them
    source: str  # name of the images in the manifest
    class_names: tuple[str, ...]  # in label order
    vae: VAE
    image_size: int  # pixels a side
    flip: str  # "none", or "both" to store the moments of the mirror images as well
    shard_size: int  # images
    batch_size: int  # images at a time; a multiple of this process's devices
    threads: int  # that read images

    def __post_init__(self) -> None:
        factor = self.vae.downsample_factor
        if self.image_size < 1 or self.image_size % factor:
            raise InputError(
                f"--image_size={self.image_size}: expected a multiple of the VAE's downsample factor {factor}."
            )
        if self.vae.config.in_channels not in (1, 3):
            raise InputError(f"the VAE reads {self.vae.config.in_channels} channels: expected 1 (grey) or 3 (RGB).")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        side = self.image_size // self.vae.downsample_factor
        return side, side, self.vae.latent_channels

    @cached_property
    def key_bytes(self) -> int:
        """Length of the longest key."""
        return max(len(key_bytes_of(key)) for key in self.images.keys)

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide every byte of the shards."""
        return {
            "image_size": self.image_size,
            "flip": self.flip,
            "shard_size": self.shard_size,
            "dtype": self.vae.dtype,
            "vae_tile": self.vae.tiling.size if self.vae.tiling is not None else 0,
            "vae_fingerprint": self.vae.fingerprint,
            "number of images": len(self.images),
            "images": self.images.identity,
            "class_names": list(self.class_names),
        }

    def shard_names(self) -> list[str]:
        """Return the shards' files, in order."""
        count = -(-len(self.images) // self.shard_size)
        return [f"shard-{number:05d}-of-{count:05d}.array_record" for number in range(count)]

    def rows(self, number: int) -> range:
        """Return the indices of a shard's images."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, len(self.images)))

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode images float32 (B, size, size, channels) in [-1, 1]: mean and std, float16 (B, views, h, w, C)."""
        views = [images, images[:, :, ::-1]] if self.flip == "both" else [images]
        moments = [self.vae.encode(view) for view in views]
        mean, std = (np.stack([np.asarray(part) for part in parts], axis=1) for parts in zip(*moments, strict=True))
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes Inf and is rejected
            return mean.astype(np.float16), std.astype(np.float16)
