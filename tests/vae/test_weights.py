import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from mpdit_jax.errors import ConfigError, InputError, MissingExtraError, WeightsError
from mpdit_jax.vae import AutoencoderConfig, load_folder, load_vae, save_folder
from mpdit_jax.vae.config import config_to_diffusers
from mpdit_jax.vae.weights import fingerprint, from_diffusers, to_diffusers
from tests.vae.conftest import TINY, assert_bitwise_equal, random_images, random_parameters

WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def folder(tmp_path, tiny_parameters):
    save_folder(tmp_path / "vae", TINY, tiny_parameters)
    return tmp_path / "vae"


def with_old_names(state, *, pointwise):
    renamed = {}
    for name, value in state.items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
        is_map = any(f".{old}.weight" in name for old in OLD_NAMES.values())
        renamed[name] = value[:, :, None, None] if is_map and pointwise else value
    return renamed


def rewrite(folder, state):
    safetensors.numpy.save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        AutoencoderConfig(
            block_out_channels=(8, 16),
            norm_num_groups=8,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            shift_factor=0.0609,
        ),
    ],
)
def test_saved_and_loaded_is_the_same_bit_for_bit(tmp_path, config):
    parameters = random_parameters(config)
    save_folder(tmp_path, config, parameters)
    loaded_config, loaded = load_folder(tmp_path)
    assert loaded_config == config
    assert_bitwise_equal(loaded, parameters)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_names_and_layouts_are_diffusers(tiny_parameters):
    state = to_diffusers(tiny_parameters)
    shapes = {name: value.shape for name, value in state.items()}
    assert shapes["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"] == (16, 8, 1, 1)
    assert shapes["encoder.down_blocks.0.downsamplers.0.conv.weight"] == (8, 8, 3, 3)
    assert shapes["decoder.up_blocks.1.upsamplers.0.conv.bias"] == (16,)
    assert shapes["decoder.mid_block.attentions.0.to_out.0.weight"] == (16, 16)
    assert shapes["encoder.conv_norm_out.weight"] == (16,)
    assert shapes["quant_conv.weight"] == (8, 8, 1, 1)
    kernel = np.asarray(tiny_parameters["encoder.conv_in.kernel"])
    assert state["encoder.conv_in.weight"][5, 2, 0, 1] == kernel[0, 1, 2, 5]


@pytest.mark.parametrize("pointwise", [False, True])
def test_reads_old_attention_names(folder, tiny_parameters, pointwise):
    state = with_old_names(to_diffusers(tiny_parameters), pointwise=pointwise)
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    rewrite(folder, state)
    assert_bitwise_equal(load_folder(folder)[1], tiny_parameters)


def test_refuses_both_namings_at_once(tiny_parameters):
    state = to_diffusers(tiny_parameters)
    old = with_old_names(state, pointwise=False)
    with pytest.raises(WeightsError, match=r"both .*\.key\.bias and .*\.to_k\.bias"):
        from_diffusers(state | old, TINY, "state")


def test_names_everything_wrong_in_one_error(folder, tiny_parameters):
    state = to_diffusers(tiny_parameters)
    del state["encoder.conv_in.weight"], state["post_quant_conv.bias"]
    state["loss.logvar"] = np.zeros(1, np.float32)
    state["quant_conv.bias"] = np.zeros(3, np.float32)
    state["decoder.conv_in.bias"] = np.full(16, np.nan, np.float32)
    rewrite(folder, state)
    with pytest.raises(WeightsError) as caught:
        load_vae(folder)
    for words in (
        "missing: encoder.conv_in.weight, post_quant_conv.bias;",
        "extra: loss.logvar;",
        "quant_conv.bias is (3,) instead of (8,);",
        "not finite: decoder.conv_in.bias.",
        str(folder / WEIGHTS),
    ):
        assert words in str(caught.value)


def test_says_which_files_are_missing(tmp_path, folder):
    with pytest.raises(WeightsError, match=r"missing config\.json and .*safetensors or .*\.bin; .*holds nothing"):
        load_vae(_made(tmp_path / "empty"))
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=rf"missing config\.json; the folder holds {WEIGHTS}"):
        load_vae(folder)
    (folder / WEIGHTS).rename(folder / "vae.bf16.safetensors")
    with pytest.raises(WeightsError, match=rf"; if vae\.bf16\.safetensors has the weights, rename it to {WEIGHTS}"):
        load_vae(folder)
    pipeline = _made(tmp_path / "pipeline")
    _made(pipeline / "vae").joinpath("config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"whole pipeline, so pass .*vae"):
        load_vae(pipeline)


def _made(path):
    path.mkdir()
    return path


def test_refuses_a_damaged_file_and_an_unsupported_config(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(WeightsError, match="not a readable safetensors"):
        load_vae(folder)
    (folder / "config.json").write_text(json.dumps(config_to_diffusers(TINY) | {"act_fn": "relu"}))
    with pytest.raises(ConfigError, match="act_fn='relu'"):
        load_vae(folder)


def test_bin_without_pytorch_names_the_extra(folder, monkeypatch):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"mpdit_jax with its extra \[torch\]"):
        load_vae(folder)


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model.fp16.safetensors", ".index.json", ".index.fp16.json"],
    ids=["fp16", "index", "both"],
)
def test_reads_the_files_that_diffusers_writes_otherwise(folder, tiny_parameters, name):
    """Weights in half precision alone, and weights that are split into several files."""
    if "index" in name:
        state = to_diffusers(tiny_parameters)
        shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": sorted(state)[i::2] for i in range(2)}
        for shard, names in shards.items():
            safetensors.numpy.save_file({entry: np.ascontiguousarray(state[entry]) for entry in names}, folder / shard)
        index = {"weight_map": {entry: shard for shard, names in shards.items() for entry in names}}
        (folder / f"{WEIGHTS}{name}").write_text(json.dumps(index), encoding="utf-8-sig")
        (folder / WEIGHTS).unlink()
    else:
        (folder / WEIGHTS).rename(folder / name)
    assert_bitwise_equal(load_folder(folder)[1], tiny_parameters)


def test_an_index_lists_files_of_its_own_folder(folder):
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)
    for content in ({"weight_map": {"x": f"../{WEIGHTS}"}}, {"weights": []}, []):
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))
        with pytest.raises(WeightsError, match=r"index\.json is no readable index of weights"):
            load_folder(folder)


def test_reads_half_precision_files(folder, tiny_parameters):
    state = {name: jnp.asarray(value, jnp.bfloat16) for name, value in to_diffusers(tiny_parameters).items()}
    safetensors.flax.save_file(state, folder / WEIGHTS)
    loaded = load_folder(folder)[1]
    assert_bitwise_equal(
        loaded, {path: value.astype(jnp.bfloat16).astype(jnp.float32) for path, value in tiny_parameters.items()}
    )


def test_parameters_do_not_share_memory_with_the_state_dict(tiny_parameters):
    state = to_diffusers(tiny_parameters)
    parameters = from_diffusers(state, TINY, "state")
    for value in state.values():
        value += 1
    assert_bitwise_equal(parameters, tiny_parameters)


def test_save_refuses_parameters_of_another_architecture_and_an_unwritable_folder(tmp_path, tiny_parameters):
    with pytest.raises(WeightsError, match=r"missing: .*down_blocks"):
        save_folder(tmp_path / "a", AutoencoderConfig(block_out_channels=(8,), norm_num_groups=4), {})
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_folder(tmp_path / "file", TINY, tiny_parameters)


def test_fingerprint_is_of_the_weights_alone(folder, tiny_vae, tiny_parameters):
    assert tiny_vae.fingerprint == fingerprint(tiny_parameters) == load_vae(folder, dtype="bfloat16").fingerprint
    rewrite(folder, with_old_names(to_diffusers(tiny_parameters), pointwise=True))
    assert load_vae(folder).fingerprint == tiny_vae.fingerprint
    assert len(tiny_vae.fingerprint) == 64
    changed = dict(tiny_parameters)
    changed["quant_conv.bias"] = changed["quant_conv.bias"].at[0].add(1e-6)
    assert fingerprint(changed) != tiny_vae.fingerprint


def test_a_loaded_vae_computes_what_the_saved_one_did(folder, tiny_vae):
    images = random_images(1, 16, 16, 3)
    np.testing.assert_array_equal(load_vae(str(folder)).encode(images)[0], tiny_vae.encode(images)[0])
