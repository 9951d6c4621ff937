"""Checksum of a model: digests of a forward pass and of every parameter."""

import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import split


class Checksum(NamedTuple):
    """Digests of a forward pass and of the parameters, and the RMS of the pass's output.

    The forward pass alone would miss most rows of the class table, and every parameter of an untrained model.
    """

    forward: str
    rms: str
    parameters: str

    def __str__(self) -> str:
        return f"forward pass {self.forward} (RMS {self.rms}), parameters {self.parameters}"


def checksum(model: MPDiT) -> Checksum:
    """Compute the checksum; its forward pass has two fixed examples (one of the null class) in float32 as on CPUs.

    The row of a null class that was not trained is left out, since the published names have none.
    """
    untrained = not model.config.null_class
    x = jax.random.normal(jax.random.key(0), (2, *model.input_shape))
    same = model.astype("float32").for_platform("cpu")
    velocity = np.asarray(same(x, jnp.array([0.25, 0.75]), jnp.array([0, model.num_classes - untrained])))
    forward = hashlib.sha256(velocity.tobytes()).hexdigest()[:12]
    parameters = hashlib.sha256()
    for name, array in sorted(split(model)[1].items()):
        values = np.ascontiguousarray(
            array[:-1] if untrained and name == "class_embedding.table" else array, np.float32
        )
        parameters.update(f"{name} {values.shape}\0".encode() + values.tobytes())
    return Checksum(forward, f"{float(np.sqrt(np.square(velocity).mean())):.6f}", parameters.hexdigest()[:12])
