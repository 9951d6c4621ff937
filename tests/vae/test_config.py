import dataclasses
import json

import pytest

from mpdit_jax.errors import ConfigError, WeightsWarning
from mpdit_jax.vae import AutoencoderConfig
from mpdit_jax.vae.config import config_from_diffusers, config_to_diffusers, read_config

# stabilityai/sd-vae-ft-ema's config.json: keys that later versions write are absent.
SD_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def test_reads_what_old_checkpoints_carry():
    config = config_from_diffusers(SD_VAE)
    assert config == AutoencoderConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=256)
    assert (config.downsample_factor, config.scaling_factor, config.shift_factor) == (8, 0.18215, None)


def test_survives_json_unchanged():
    config = AutoencoderConfig(
        block_out_channels=(32, 64),
        latent_channels=16,
        shift_factor=0.0609,
        scaling_factor=1.5305,
        use_quant_conv=False,
        latents_mean=(0.5, 1.0),
        latents_std=(1.0, 2.0),
        sample_size=(64, 32),
    )
    assert config_from_diffusers(json.loads(json.dumps(config_to_diffusers(config)))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "AutoencoderTiny"}, ["_class_name='AutoencoderTiny'"]),
        ({"act_fn": "gelu"}, ["act_fn='gelu'", "'silu'"]),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, ["down_block_types", "AttnDownEncoderBlock2D"]),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, ["up_block_types of length 3"]),
        ({"temporal_layers": 2, "act_fn": "mish"}, ["temporal_layers=2", "act_fn='mish'"]),
        ({"layers_per_block": None}, ["layers_per_block=null"]),
        ({"layers_per_block": 0}, ["layers_per_block", "0"]),
        ({"latent_channels": True}, ["latent_channels", "True"]),
        ({"block_out_channels": [128, 100, 512, 512]}, ["100", "norm_num_groups=32"]),
        ({"scaling_factor": -1.0}, ["scaling_factor", "-1.0"]),
        ({"scaling_factor": "0.18"}, ["scaling_factor is '0.18'", "a positive number"]),
        ({"scaling_factor": float("nan")}, ["scaling_factor is nan"]),
        ({"scaling_factor": float("inf")}, ["scaling_factor is inf"]),
        ({"scaling_factor": 10**400}, ["scaling_factor is 1000"]),
        ({"shift_factor": float("-inf")}, ["shift_factor is -inf", "a finite number"]),
        ({"shift_factor": [0.1]}, ["shift_factor is (0.1,)"]),
        ({"latents_mean": ["0"]}, ["latents_mean is ('0',)"]),
        ({"latents_std": 1.0}, ["latents_std is 1.0"]),
        ({"sample_size": "256"}, ["sample_size is '256'"]),
        ({"use_quant_conv": "false"}, ["use_quant_conv is 'false'", "true or false"]),
        ({"down_block_types": 3}, ["down_block_types=3"]),
        ({"up_block_types": "UpDecoderBlock2D"}, ["up_block_types='UpDecoderBlock2D'"]),
        ({"up_block_types": None}, ["up_block_types=None"]),
        ({"block_out_channels": 128}, ["block_out_channels is 128"]),
        ({"block_out_channels": []}, ["block_out_channels"]),
        ({"act_fn": ["silu"]}, ["act_fn=['silu']"]),
    ],
)
def test_refuses_by_name(change, words):
    with pytest.raises(ConfigError) as caught:
        config_from_diffusers(SD_VAE | change)
    for word in words:
        assert word in str(caught.value)


def test_keys_that_are_null_or_bookkeeping_do_not_matter():
    assert config_from_diffusers(SD_VAE | {"_name_or_path": "x", "some_future_key": None}) == config_from_diffusers(
        SD_VAE
    )


def test_keys_that_change_no_result_are_named_and_a_mark_at_the_beginning_is_skipped(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SD_VAE | {"torch_dtype": "float16"}), encoding="utf-8-sig")
    with pytest.warns(WeightsWarning, match=r"torch_dtype='float16' is ignored: it changes no result"):
        assert read_config(path) == config_from_diffusers(SD_VAE)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_refuses_a_file_that_is_no_json_object(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(path)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AutoencoderConfig().latent_channels = 8
