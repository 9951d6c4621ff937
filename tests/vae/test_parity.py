"""Comparisons with diffusers' AutoencoderKL on random weights."""

import numpy as np
import pytest

from mpdit_jax.errors import WeightsError
from mpdit_jax.vae import AutoencoderConfig, load_folder, load_vae, save_folder
from mpdit_jax.vae.config import config_to_diffusers
from studies.beside_torch.torch_operators import import_diffusers
from tests.conftest import relative_error
from tests.vae.conftest import TINY, assert_bitwise_equal, random_images, random_parameters
from tests.vae.test_weights import WEIGHTS, rewrite, with_old_names

pytestmark = pytest.mark.parity

SD = AutoencoderConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
SIXTEEN = AutoencoderConfig(
    block_out_channels=(16, 32, 32),
    layers_per_block=2,
    norm_num_groups=8,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)
NO_ATTENTION = AutoencoderConfig(block_out_channels=(16, 32), norm_num_groups=16, mid_block_add_attention=False)


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("diffusers")
    return pytest.importorskip("torch")


def make_reference(torch, config, folder):
    """Save diffusers' model with random weights, its norms and biases different from their initial values."""
    diffusers = import_diffusers()

    torch.manual_seed(0)
    model = diffusers.AutoencoderKL.from_config(config_to_diffusers(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def theirs(torch, model, images, latents):
    """Return mean, std and decoded image of diffusers' model, in the dtype of its weights."""
    dtype = model.encoder.conv_in.weight.dtype
    with torch.inference_mode():
        posterior = model.encode(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype)).latent_dist
        decoded = model.decode(torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()).to(dtype)).sample
    return [x.float().numpy().transpose(0, 2, 3, 1) for x in (posterior.mean, posterior.std, decoded)]


def ours(vae, images, latents):
    return [np.asarray(x) for x in (*vae.encode(images), vae.decode(latents, clip=False))]


def make_inputs(config, side):
    factor = config.downsample_factor
    images = random_images(2, side, 2 * side, config.in_channels)
    return images, 3 * random_images(2, side // factor, 2 * side // factor, config.latent_channels, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("config", [TINY, SIXTEEN, NO_ATTENTION], ids=["tiny", "sixteen_channels", "no_attention"])
def test_encode_and_decode(torch, tmp_path, config):
    model, inputs = make_reference(torch, config, tmp_path), make_inputs(config, 32)
    reference, half = theirs(torch, model, *inputs), theirs(torch, model.to(torch.bfloat16), *inputs)
    for found, expected in zip(ours(load_vae(tmp_path), *inputs), reference, strict=True):
        assert relative_error(found, expected) < 1e-3
    for found, rounded, expected in zip(
        ours(load_vae(tmp_path, dtype="bfloat16"), *inputs), half, reference, strict=True
    ):
        assert relative_error(found, expected) < 2e-2
        assert relative_error(found, expected) < 1.2 * relative_error(rounded, expected)  # as PyTorch rounds, or better


@pytest.mark.slow
def test_encode_and_decode_at_full_size(torch, tmp_path):
    model, inputs = make_reference(torch, SD, tmp_path), make_inputs(SD, 64)
    reference = theirs(torch, model, *inputs)
    for found, expected in zip(ours(load_vae(tmp_path), *inputs), reference, strict=True):
        assert relative_error(found, expected) < 1e-3
    for found, expected in zip(ours(load_vae(tmp_path, dtype="bfloat16"), *inputs), reference, strict=True):
        assert relative_error(found, expected) < 2e-2


def test_old_attention_names_mean_the_same_to_diffusers(torch, tmp_path):
    diffusers = import_diffusers()

    model = make_reference(torch, TINY, tmp_path)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    rewrite(tmp_path, with_old_names(state, pointwise=False))
    images, latents = random_images(1, 32, 32, 3), random_images(1, 8, 8, 4)
    reread = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    vae = load_vae(tmp_path)
    for expected in (theirs(torch, model, images, latents), theirs(torch, reread, images, latents)):
        assert relative_error(vae.encode(images)[0], expected[0]) < 1e-3
        assert relative_error(vae.decode(latents, clip=False), expected[2]) < 1e-3


def test_bin_files_read_the_same(torch, tmp_path):
    model = make_reference(torch, TINY, tmp_path)
    from_safetensors = load_folder(tmp_path)[1]
    (tmp_path / WEIGHTS).unlink()
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    assert_bitwise_equal(load_folder(tmp_path)[1], from_safetensors)


def test_a_bin_file_that_would_run_code_is_refused(torch, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    save_folder(tmp_path, TINY, random_parameters(TINY))
    (tmp_path / WEIGHTS).unlink()
    torch.save({"encoder.conv_in.weight": Trap()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightsError, match="was not loaded, since it could run code"):
        load_vae(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_diffusers_opens_what_we_save(torch, tmp_path):
    diffusers = import_diffusers()

    parameters = random_parameters(SIXTEEN)
    save_folder(tmp_path / "ours", SIXTEEN, parameters)
    model, info = diffusers.AutoencoderKL.from_pretrained(
        tmp_path / "ours", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info.values())
    assert model.config.shift_factor == 0.0609
    model.save_pretrained(tmp_path / "theirs")
    config, reread = load_folder(tmp_path / "theirs")
    assert config == SIXTEEN
    assert_bitwise_equal(reread, parameters)
    latents = random_images(1, 4, 4, 16)
    with torch.inference_mode():
        expected = model.eval().decode(torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())).sample.numpy()
    found = np.moveaxis(np.asarray(load_vae(tmp_path / "ours").decode(latents, clip=False)), -1, 1)
    assert relative_error(found, expected) < 1e-3
