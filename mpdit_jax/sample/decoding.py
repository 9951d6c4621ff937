"""Decode a run's latents with the VAE that encoded its data."""

import jax
import jax.numpy as jnp

from mpdit_jax.checkpoint.load import load_config
from mpdit_jax.data.info import read_dataset_info
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import InputError
from mpdit_jax.sample.drawing import Decode
from mpdit_jax.vae import NO_VAE, PIXELS, check_fingerprint, decode_all, load_vae, tiles


def make_decode(
    workdir: str, vae: str | None, dtype: str = "float32", tile: int = 0, argument: str = "--vae"
) -> Decode | None:
    """Build a decoder of a run's latents; None for a run on images.

    Args:
        workdir: the run's folder.
        vae: folder or hub name; "", "none" or None for a run in pixel space.
        dtype: the VAE's compute dtype.
        tile: decode larger images in tiles of so many pixels; 0 for whole images.
        argument: the name of `vae` in errors.

    Returns:
        A function from normalized latents (n, h, w, C) to images (n, H, W, 1 or 3) in [-1, 1], for any n.

    Raises:
        InputError: a VAE is missing, not needed, or not the one that encoded the run's latents.
    """
    vae = "" if vae is None or vae == NO_VAE else vae
    info = read_dataset_info(workdir)
    space = info.latents if info is not None else None
    if space is None and load_config(workdir).data.name == "latents":
        raise InputError(
            f"{workdir} does not record how its latents are normalized, so that they cannot be decoded; convert its "
            "weights again with --config.data.path=FOLDER, the latents it was trained on."
        )
    in_pixels = space is None or space.vae_fingerprint == PIXELS
    if vae and in_pixels:
        raise InputError(f"{argument}={vae}: {workdir} is a run on pixels, which needs no VAE: leave it out.")
    if space is None:
        return None
    if not vae and not in_pixels:
        known = f" (fingerprint {space.vae_fingerprint[:12]}…)" if space.vae_fingerprint else ""
        raise InputError(f"{workdir} was trained on latents: give {argument}=FOLDER, the VAE they come from{known}.")
    loaded = load_vae(vae or None, dtype=dtype, mesh=make_mesh(devices=jax.local_devices()), tiling=tiles(tile))
    check_fingerprint(loaded, space.vae_fingerprint, f"{argument}={vae}", f"{workdir} was trained on latents of")
    mean, std = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (space.mean, space.std))
    return lambda latents: decode_all(loaded, latents * std + mean)
