"""Decode a store of latents with the VAE that encoded it."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpdit_jax.data.image_sets import DecodeStored, FindDecode
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import InputError
from mpdit_jax.vae import NO_VAE, PIXELS, check_fingerprint, decode_all, load_vae, tiles


def find_decode(vae: str, dtype: str = "float32", tile: int = 0, *, name: str = "--vae") -> FindDecode:
    """Return a function that finds a store's decoder, see `FindDecode`. A store of pixels needs no VAE.

    Args:
        vae: folder or hub name; "" or "none" for none. Loaded when a store needs it.
        dtype: the VAE's compute dtype.
        tile: decode larger images in tiles of so many pixels; 0 for whole images.
        name: the flag or field that gives the VAE, for messages.
    """
    mesh = make_mesh(devices=jax.local_devices())
    load = lru_cache(lambda source: load_vae(source, dtype=dtype, mesh=mesh, tiling=tiles(tile)))

    def find(store: Path, fingerprint: str) -> tuple[DecodeStored, dict[str, Any]]:
        in_pixels = fingerprint == PIXELS
        if not in_pixels and vae in ("", NO_VAE):
            raise InputError(
                f"{store} is a store of latents: give {name}=FOLDER, the VAE that encoded it (fingerprint "
                f"{fingerprint[:12]}…)."
            )
        loaded = load(None if in_pixels else vae)
        check_fingerprint(loaded, fingerprint, f"{name}={vae}", f"{store} holds latents of")
        settings = {} if in_pixels else {"vae_dtype": dtype, "vae_tile": tile}
        return lambda latents: np.asarray(decode_all(loaded, latents)), settings

    return find
