"""Latents to train on: a store's moments, and the constants that normalize samples from them."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from mpdit_jax.data.latent_store import LatentStore
from mpdit_jax.errors import ConfigError, DataError

Statistics: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, (C,) each."""

NORMALIZATIONS = ("auto", "paper", "manifest", "vae")
PAPER_MEAN = (5.81, 3.25, 0.12, -2.15)
"""The paper's means of Stable Diffusion's unscaled latents on ImageNet, one a channel."""
PAPER_STD = (4.17, 4.62, 3.71, 3.28)
"""The paper's standard deviations of the same latents."""
# Limits of a channel's mean and standard deviation after normalization, which are 0 and 1 if the constants fit. Latents
# of Stable Diffusion's VAE stay within them for other pictures than ImageNet's. SDXL's, also of 4 channels, exceed two.
_LARGEST_MEAN, _STDS = 1.5, (0.4, 2.0)


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """The constants that turn a model's latents into those of the VAE: `latents * std + mean`."""

    mean: tuple[float, ...]  # of each channel, (C,)
    std: tuple[float, ...]
    vae_fingerprint: str  # SHA-256 of the VAE's weights; "" if it is not known


def load_latents(path: str, normalization: str = "auto") -> tuple[LatentStore, LatentSpace]:
    """Open the latents in a folder that `python -m mpdit_jax.prepare` has made.

    Args:
        path: the folder.
        normalization: "paper" for the constants of Stable Diffusion's VAE, "manifest" for those measured by prepare,
            "vae" for the VAE's own scaling and shift factors, "auto" for the paper's where they fit the latents of this
            VAE, see `check_normalization`, and the measured ones elsewhere.

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
    measured = manifest.latent_mean, manifest.latent_std
    if normalization == "auto":
        fits = len(manifest.latent_mean) == len(PAPER_MEAN) and _fits((PAPER_MEAN, PAPER_STD), measured)
        normalization = "paper" if fits else "manifest"
    if normalization == "manifest":
        if 0 in manifest.latent_std:
            raise DataError(
                f"{path}: channel {manifest.latent_std.index(0)} of the latents has standard deviation 0, by which "
                "config.data.normalization='manifest' would divide: set it to 'vae', the VAE's own factors, or prepare "
                "images that differ."
            )
        mean, std = measured
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


def check_normalization(space: LatentSpace, measured: Statistics) -> None:
    """Raise DataError if a space's constants are far from the measured mean and standard deviation of each channel."""
    if not _fits((space.mean, space.std), measured):
        mean, std = measured
        raise DataError(
            f"config.data.normalization={normalization_of(space, measured)!r} has means {_say(space.mean)} and "
            f"standard deviations {_say(space.std)}, and these latents have means {_say(mean)} and standard deviations "
            f"{_say(std)}: set it to 'manifest', the constants measured on them."
        )


def normalization_of(space: LatentSpace, measured: Statistics) -> str:
    """Return the name in NORMALIZATIONS of a space's constants."""
    if (space.mean, space.std) == measured:
        return "manifest"
    return "paper" if (space.mean, space.std) == (PAPER_MEAN, PAPER_STD) else "vae"


def _fits(constants: Statistics, measured: Statistics) -> bool:
    """Return whether latents with the measured statistics, normalized by the constants, are near N(0, 1)."""
    shifts = [abs(m - mean) / std for m, mean, std in zip(measured[0], *constants, strict=True)]
    spreads = [s / std for s, std in zip(measured[1], constants[1], strict=True)]
    return max(shifts) <= _LARGEST_MEAN and min(spreads) >= _STDS[0] and max(spreads) <= _STDS[1]


def _say(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
