"""Latents to train on: the moments of a store, and the constants that bring samples from them to unit variance."""

import dataclasses

import numpy as np

from mpdit_jax.data.latent_store import LatentStore
from mpdit_jax.errors import ConfigError, DataError

NORMALIZATIONS = ("paper", "manifest", "vae")
PAPER_MEAN = (5.81, 3.25, 0.12, -2.15)
"""Of Stable Diffusion's unscaled latents on ImageNet, channel by channel (the paper's constants)."""
PAPER_STD = (4.17, 4.62, 3.71, 3.28)


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """What turns a model's latents into those of the VAE: `latents * std + mean`.

    Attributes:
        mean: of each channel, (C,).
        std: likewise.
        vae_fingerprint: SHA-256 of the VAE's weights.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    vae_fingerprint: str


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """The examples of a store, as moments: what is drawn from them is drawn on the device, anew at every visit."""

    store: LatentStore
    latents: LatentSpace

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, C) of an example."""
        return self.store.manifest.latent_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class, in label order."""
        return self.store.manifest.class_names

    @property
    def labels(self) -> np.ndarray:
        """int32 (N,)."""
        return self.store.labels

    @property
    def contents(self) -> str:
        """Of the store, see `Manifest.contents`."""
        return self.store.manifest.contents

    def __len__(self) -> int:
        return len(self.store)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at `indices` (n,): `mean` and `std` float16 (n, views, h, w, C), `y` int32 (n,)."""
        mean, std = self.store.moments(indices)
        return {"mean": mean, "std": std, "y": self.store.labels[indices]}


def load_latents(path: str = "", split: str = "train", normalization: str = "paper") -> LatentSource:
    """The latents in a folder that `python -m mpdit_jax.prepare` has made.

    Args:
        path: the folder.
        split: unused; the folder is the split.
        normalization: "paper" for the constants of Stable Diffusion's VAE, "manifest" for those measured by prepare,
            "vae" for the VAE's own scaling and shift factors.

    Raises:
        DataError: no finished store there, or a damaged one, or a channel that has one value everywhere and would be
            divided by its standard deviation of 0.
        ConfigError: the paper's constants for another number of channels.
    """
    if not path:
        raise DataError(
            "config.data.path is empty: expected a folder of latents, made by `python -m mpdit_jax.prepare --help`."
        )
    store = LatentStore(path)
    if not len(store):
        raise DataError(f"{path}: there are no examples.")
    manifest = store.manifest
    if normalization == "manifest":
        if 0 in manifest.latent_std:
            raise DataError(
                f"{path}: channel {manifest.latent_std.index(0)} of the latents has standard deviation 0, by which "
                "config.data.normalization='manifest' would divide: set it to 'vae', the VAE's own factors, or prepare "
                "images that differ."
            )
        mean, std = manifest.latent_mean, manifest.latent_std
    elif normalization == "vae":
        channels = manifest.latent_shape[2]
        mean, std = (manifest.shift_factor,) * channels, (1 / manifest.scaling_factor,) * channels
    elif manifest.latent_shape[2] == len(PAPER_MEAN):
        mean, std = PAPER_MEAN, PAPER_STD
    else:
        raise ConfigError(
            f"config.data.normalization='paper' has {len(PAPER_MEAN)} channels and the latents in {path} have "
            f"{manifest.latent_shape[2]}: set it to 'manifest', the constants measured on them, or to 'vae', its own."
        )
    return LatentSource(store, LatentSpace(mean, std, manifest.vae_fingerprint))
