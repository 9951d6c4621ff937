"""What two models have in common if they are the same: what they compute, and every parameter."""

import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import split


class Checksum(NamedTuple):
    """Digests, and how large the forward pass's output is.

    A forward pass sees two rows of the class table, and an untrained model computes zeros: every parameter is in the
    other digest.
    """

    forward: str
    rms: str
    parameters: str

    def __str__(self) -> str:
        return f"forward pass {self.forward} (RMS {self.rms}), parameters {self.parameters}"


def checksum(model: MPDiT) -> Checksum:
    """Of a forward pass of two fixed examples, one of them of the null class, and of the parameters.

    Whatever the config says of the machine it is for, the pass is computed in float32 as on CPUs.
    """
    x = jax.random.normal(jax.random.key(0), (2, *model.input_shape))
    same = model.astype("float32").for_platform("cpu")
    # DiT's times are steps; any number is as good for comparing.
    velocity = np.asarray(same(x, jnp.array([0.25, 0.75]), jnp.array([0, model.num_classes])))
    forward = hashlib.sha256(velocity.tobytes()).hexdigest()[:12]
    parameters = hashlib.sha256()
    for name, array in sorted(split(model)[1].items()):
        values = np.ascontiguousarray(array, np.float32)
        parameters.update(f"{name} {values.shape}\0".encode() + values.tobytes())
    return Checksum(forward, f"{float(np.sqrt(np.square(velocity).mean())):.6f}", parameters.hexdigest()[:12])
