import subprocess
import sys

import jax
import numpy as np
import pytest

from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import InputError
from mpdit_jax.vae import VAE
from tests.conftest import relative_error
from tests.tiny import environment
from tests.vae.conftest import TINY, random_images

_ON_EIGHT_DEVICES = """
import jax, numpy as np, pytest
from mpdit_jax.errors import InputError
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.vae import VAE, Tiling
from tests.conftest import relative_error
from tests.vae.conftest import TINY, random_images, random_parameters

assert jax.device_count() == 8
parameters, images = random_parameters(TINY), random_images(16, 32, 32, 3)
for tiling in (None, Tiling(size=16, overlap=4)):
    one = VAE(TINY, parameters, tiling=tiling)
    many = VAE(TINY, parameters, mesh=make_mesh(data=4, fsdp=2), tiling=tiling)
    for found, expected in zip(many.encode(images), one.encode(images), strict=True):
        assert len(found.sharding.device_set) == 8 and found.addressable_shards[0].data.shape[0] == 2
        assert relative_error(found, expected) < 1e-5
    latents = many.encode(images)[0]  # stays where it is
    found = many.decode(latents)
    assert len(found.sharding.device_set) == 8
    assert relative_error(found, one.decode(np.asarray(latents))) < 1e-5
    text = many._encode.lower(many.parameters, many._place(images)).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))
assert many.fingerprint == one.fingerprint
with pytest.raises(InputError, match="batch size 12.*8 devices.*pad it to 16"):
    many.encode(images[:12])
print("passed")
"""


@pytest.mark.slow
def test_eight_devices_agree_with_one_without_communication():
    done = subprocess.run([sys.executable, "-c", _ON_EIGHT_DEVICES], env=environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout


def test_a_mesh_of_one_device(tiny_vae, tiny_parameters):
    vae = VAE(TINY, tiny_parameters, mesh=make_mesh(devices=jax.devices()[:1]))
    images = random_images(3, 16, 16, 3)
    assert relative_error(vae.encode(images)[0], tiny_vae.encode(images)[0]) < 1e-5
    with pytest.raises(InputError, match="uint8"):
        vae.encode(np.zeros((1, 16, 16, 3), np.uint8))
