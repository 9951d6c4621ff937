"""From a model's latents to pictures, by the VAE whose latents it was trained on."""

import jax
import jax.numpy as jnp

from mpdit_jax.checkpoint.load import load_config
from mpdit_jax.data.info import read_dataset_info
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import InputError
from mpdit_jax.sample.run import Decode
from mpdit_jax.vae import NO_VAE, PIXELS, check_fingerprint, decode_all, load_vae, tiles


def make_decode(
    workdir: str, vae: str | None, dtype: str = "float32", tile: int = 0, argument: str = "--vae"
) -> Decode | None:
    """What decodes the latents of a run; None for a run on images.

    Args:
        workdir: of the run.
        vae: folder or hub name; "", "none" or None for none, as a run in pixel space has.
        dtype: the VAE computes in.
        tile: image pixels of the tiles that larger images are decoded in; 0 for whole images.
        argument: what errors call `vae`.

    Returns:
        A function of normalized latents (n, h, w, C), for any n, that gives images (n, H, W, 1 or 3) in [-1, 1].

    Raises:
        InputError: a VAE is needed and not given, or given and not needed, or another one.
    """
    vae = "" if vae is None or vae == NO_VAE else vae
    facts = read_dataset_info(workdir)
    space = facts.latents if facts is not None else None
    if space is None:
        if vae:
            raise InputError(
                f"{argument}={vae}: {workdir} is a run on {load_config(workdir).data.name}, which has no latents."
            )
        return None
    if not vae and space.vae_fingerprint != PIXELS:
        raise InputError(
            f"{workdir} was trained on latents: give {argument}=FOLDER, the VAE they come from (fingerprint "
            f"{space.vae_fingerprint[:12]}…)."
        )
    loaded = load_vae(vae or None, dtype=dtype, mesh=make_mesh(devices=jax.local_devices()), tiling=tiles(tile))
    check_fingerprint(loaded, space.vae_fingerprint, f"{argument}={vae}", f"{workdir} was trained on latents of")
    mean, std = jnp.asarray(space.mean, jnp.float32), jnp.asarray(space.std, jnp.float32)
    return lambda latents: decode_all(loaded, latents * std + mean)
