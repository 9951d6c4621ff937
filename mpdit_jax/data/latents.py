"""Latents to train on: a store's moments, and the constants that normalize samples from them."""

import dataclasses
from collections.abc import Sequence

from mpdit_jax.data.latent_store import LatentStore
from mpdit_jax.errors import ConfigError, DataError

NORMALIZATIONS = ("paper", "manifest", "vae")
PAPER_MEAN = (5.81, 3.25, 0.12, -2.15)
"""The paper's means of Stable Diffusion's unscaled latents on ImageNet, one a channel."""
PAPER_STD = (4.17, 4.62, 3.71, 3.28)
"""The paper's standard deviations of the same latents."""
# Normalized by fitting constants, a channel has mean 0 and standard deviation 1. Other pictures than ImageNet's move
# Stable Diffusion's latents by less than this; those of SDXL's VAE, also of 4 channels, are beyond two of the limits.
_LARGEST_MEAN, _STDS = 1.5, (0.4, 2.0)


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """The constants that turn a model's latents into those of the VAE: `latents * std + mean`."""

    mean: tuple[float, ...]  # of each channel, (C,)
    std: tuple[float, ...]
    vae_fingerprint: str  # SHA-256 of the VAE's weights; "" if it is not known


def load_latents(path: str, normalization: str = "paper") -> tuple[LatentStore, LatentSpace]:
    """Open the latents in a folder that `python -m mpdit_jax.prepare` has made.

    Args:
        path: the folder.
        normalization: "paper" for the constants of Stable Diffusion's VAE, "manifest" for those measured by prepare,
            "vae" for the VAE's own scaling and shift factors.

    Raises:
        DataError: no finished store there, a damaged one, or a channel with standard deviation 0 to divide by.
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
    return store, LatentSpace(mean, std, manifest.vae_fingerprint)


def check_normalization(space: LatentSpace, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise DataError if the paper's constants are far from the measured `mean` and `std` of each channel (C,)."""
    if space.mean != PAPER_MEAN:  # the VAE's own constants were asked for by name
        return
    shifts = [abs(m - theirs) / s for m, theirs, s in zip(mean, space.mean, space.std, strict=True)]
    spreads = [s / theirs for s, theirs in zip(std, space.std, strict=True)]
    if max(shifts) > _LARGEST_MEAN or min(spreads) < _STDS[0] or max(spreads) > _STDS[1]:
        raise DataError(
            f"config.data.normalization='paper' is made for Stable Diffusion's VAE (means {_say(space.mean)}, standard "
            f"deviations {_say(space.std)}), and these latents have means {_say(mean)} and standard deviations "
            f"{_say(std)}: set it to 'manifest', the constants measured on them."
        )


def _say(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
