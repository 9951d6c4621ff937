"""Export a sampler with its weights as one program with jax.export."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from mpdit_jax.errors import InputError
from mpdit_jax.flow.inputs import check_model
from mpdit_jax.flow.protocols import Portable
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.flow.sampler import Sampler

_LIMIT = 2**31 - 1  # bytes that a flatbuffer can hold
_PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}  # jax.export's names to a model's
_Draw: TypeAlias = Callable[..., jax.Array]


def export_sampler(
    sampler: Sampler,
    model: nnx.Module,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    batch: int | None = None,
    negative_labels: Mapping[int, int] | None = None,
) -> bytes:
    """Export a program of labels int32 (B,), seed uint32 () and, if the sampler guides, scale float32 ().

    The program returns `sampler(model, labels, jax.random.key(seed))`, float32 (B, H, W, C). Latents are normalized:
    the VAE decodes `latents * std + mean`, with `mean` and `std` from `latents` in the run's data.json. Labels out of
    range give NaN. The weights are stored once for all platforms.

    Args:
        sampler: solver, steps and guidance.
        model: the model; its weights become part of the program.
        platforms: some of "cpu", "cuda", "rocm", "tpu".
        batch: labels a call; None for any number.
        negative_labels: the class to guide away from, by class.

    Raises:
        InputError: weights of 2 GiB or more, or a guidance scale for each image.
    """
    check_model(model)
    if np.ndim(sampler.guidance_scale):
        raise InputError(
            f"guidance_scale of shape {np.shape(sampler.guidance_scale)}: a file takes one scale a call; make the "
            "sampler with one number."
        )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    if size > _LIMIT:
        raise InputError(
            f"the model has {size / 2**30:.1f} GiB of weights and jax.export's format ends at 2 GiB: export a smaller "
            "model."
        )
    guided = bool(np.any(np.asarray(sampler.guidance_scale) != 1))

    def draw_on(platform: str) -> _Draw:
        placed = model.for_platform(_PLATFORMS[platform]) if isinstance(model, Portable) else model
        structure = nnx.graphdef(placed)

        def draw(state: nnx.State, labels: jax.Array, seed: jax.Array, scale: jax.Array | None = None) -> jax.Array:
            key, found = seed_key(seed), nnx.merge(structure, state)
            return sampler(found, labels, key, guidance_scale=scale, negative_labels=negative_labels)

        return draw

    state, draws = nnx.state(model), {platform: draw_on(platform) for platform in platforms}

    def draw_anywhere(*arguments: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(state, *arguments, **draws)

    length = batch if batch is not None else export.symbolic_shape("batch")[0]
    arguments = [jax.ShapeDtypeStruct((length,), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32)]
    if guided:
        arguments.append(jax.ShapeDtypeStruct((), jnp.float32))
    return bytes(export.export(jax.jit(draw_anywhere), platforms=platforms)(*arguments).serialize())
