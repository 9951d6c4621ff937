"""Decoding of stored latents, and the check that a VAE is the one that encoded them."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.vae.vae import PIXELS, VAE


def check_fingerprint(vae: VAE, fingerprint: str, argument: str, holder: str) -> None:
    """Raise InputError unless a VAE has the fingerprint of the VAE that encoded some latents; "" is not known.

    For the message, `argument` names the VAE, such as "--vae=FOLDER", and `holder` begins a clause about the latents,
    such as "FOLDER holds latents of".
    """
    if fingerprint and vae.fingerprint != fingerprint:
        none = ", which is none" if fingerprint == PIXELS else ""
        raise InputError(
            f"{argument} has fingerprint {vae.fingerprint[:12]}… and {holder} {fingerprint[:12]}…: give the VAE that "
            f"encoded them{none}."
        )


def decode_all(vae: VAE, latents: jax.Array | np.ndarray) -> jax.Array:
    """Decode unscaled latents (n, h, w, C), where n need not be a multiple of the number of devices.

    A latent that is not finite affects its own image only.
    """
    on_device: jax.Array = jax.device_put(latents)
    count, devices = len(on_device), vae.mesh.size if vae.mesh is not None else 1
    padded = on_device[jnp.arange(-(-count // devices) * devices) % count]
    with jax.set_mesh(vae.mesh) if vae.mesh is not None else nullcontext():  # the caller may have set another mesh
        return vae.decode(padded)[:count]
