"""A VAE and latents that somebody has stored: whether it made them, and decoding however many there are."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.vae.vae import PIXELS, VAE


def check_made(vae: VAE, fingerprint: str, given: str, holder: str) -> None:
    """Raise InputError unless a VAE has the fingerprint of the one that encoded some latents.

    Args:
        vae: what was given.
        fingerprint: of the VAE that encoded them.
        given: the argument that gave it, such as "--vae=FOLDER".
        holder: who has the latents, such as "FOLDER holds latents of".
    """
    if vae.fingerprint != fingerprint:
        none = ", which is none" if fingerprint == PIXELS else ""
        raise InputError(
            f"{given} has fingerprint {vae.fingerprint[:12]}… and {holder} {fingerprint[:12]}…: give the VAE that "
            f"encoded them{none}."
        )


def decode_all(vae: VAE, latents: jax.Array | np.ndarray) -> jax.Array:
    """`vae.decode` of any number of unscaled latents (n, h, w, C), also one that the mesh's devices do not divide."""
    there: jax.Array = jax.device_put(latents)
    count, devices = len(there), vae.mesh.size if vae.mesh is not None else 1
    # What fills the batch up is thrown away.
    filled = there[jnp.arange(-(-count // devices) * devices) % count]
    with jax.set_mesh(vae.mesh) if vae.mesh is not None else nullcontext():  # the caller's may be of other devices
        # A latent that is not finite spoils its own picture only, and is reported by its number.
        return vae.decode(filled)[:count]
