import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """scikit-learn's digits as PNG files, four of each of three classes."""
    from sklearn import datasets

    root, digits = tmp_path_factory.mktemp("images"), datasets.load_digits()
    for label, name in enumerate(("one", "two", "zero")):
        (root / name).mkdir()
        for index in np.flatnonzero(digits.target == (1, 2, 0)[label])[:4]:
            Image.fromarray((digits.images[index] * 15.9).astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """An untrained grey VAE, f2 with 2 latent channels."""
    return make_vae(tmp_path_factory.mktemp("vae"), seed=0)


@pytest.fixture(scope="session")
def other_vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"), seed=1)


def make_vae(path, seed):
    from flax import nnx

    from mpdit_jax.model.parameters import split
    from mpdit_jax.vae import Autoencoder, AutoencoderConfig, save_folder

    config = AutoencoderConfig(
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
    )
    save_folder(path, config, split(Autoencoder(config, rngs=nnx.Rngs(seed)))[1])
    return path


def arguments(folder, vae, out, *more):
    """Return the arguments of a small `prepare`."""
    sizes = ("--image_size=8", "--batch_size=4", "--shard_size=5", "--flip=both")
    return [f"--images={folder}", f"--vae={vae}", f"--out={out}", *sizes, *more]
