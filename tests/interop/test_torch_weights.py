import argparse
import re

import numpy as np
import pytest
import safetensors.numpy

import mpdit_jax as mp
from mpdit_jax.errors import MissingExtraError, WeightsError
from mpdit_jax.interop import files


@pytest.fixture
def state(golden):
    return golden.group("state/")


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert second[name].dtype == np.float32
        assert array.tobytes() == second[name].tobytes(), name


def test_round_trip_is_bitwise(state):
    assert_same(state, mp.to_torch(mp.load_torch(state, num_heads=4)))


def test_the_config_is_inferred_but_for_the_heads(golden, state):
    config = mp.load_torch(state, num_heads=4).config
    expected = {
        16: ((4, 2), (2, 1), (8, 8), "fno"),
        64: ((8, 4, 2), (2, 1, 1), (16, 16), "sinusoidal"),
    }[np.prod(golden["out"].shape[-2:]) // 4]
    assert (config.patch_sizes, config.depths, config.input_size, config.time_embedding) == expected
    assert (config.hidden_size, config.num_classes, config.class_tokens, config.in_channels) == (48, 10, 3, 4)


@pytest.mark.parametrize("overrides", [
    {"input_size": (8, 16)},
    {"skip": False},
    {"patch_sizes": (2,), "depths": (2,)},
    {"patch_sizes": (8, 4, 2, 1), "depths": (1, 1, 1, 1)},
    {"mlp_ratio": 3.0, "fno_width": 16, "fno_modes": 5, "fno_layers": 2},
])  # fmt: skip
def test_other_shapes_survive_the_round_trip(overrides):
    small = {"depths": (1, 1), "hidden_size": 32, "num_heads": 4, "num_classes": 5, "class_tokens": 2, "input_size": 8}
    model = mp.create_model("mpdit_b", **{**small, **overrides})
    again = mp.load_torch(mp.to_torch(model), num_heads=4)
    assert again.config == model.config
    assert_same(mp.to_torch(model), mp.to_torch(again))


def test_heads_come_from_a_preset_or_an_argument(state):
    big = mp.create_model("mpdit_b", depths=(1, 1), num_classes=3)
    assert mp.load_torch(mp.to_torch(big)).config.num_heads == 12
    narrow = mp.create_model("mpdit_b", hidden_size=384, num_heads=8, depths=(1, 1), num_classes=2, input_size=8)
    with pytest.raises(WeightsError, match=r"width 384 fits no preset.*num_heads="):  # DiT-S's width, not an MPDiT's
        mp.load_torch(mp.to_torch(narrow))
    with pytest.raises(WeightsError, match=r"width 48 fits no preset.*num_heads="):
        mp.load_torch(state)
    with pytest.raises(WeightsError, match="num_heads=5"):
        mp.load_torch(state, num_heads=5)


def test_missing_extra_and_misshapen_are_all_named(state):
    gone, wrong = "downsample_blocks.0.attn.qkv.bias", "time_modulation.1.weight"
    bad = {**state, "scheduler.betas": np.zeros(3, np.float32), wrong: state[wrong][:-1]}
    del bad[gone]
    with pytest.raises(WeightsError) as error:
        mp.load_torch(bad, num_heads=4)
    shapes = f"{wrong} is (287, 48) instead of (288, 48)"
    for part in (f"missing: {gone}", "extra: scheduler.betas", f"misshapen: {shapes}"):
        assert part in str(error.value)


def named(state, kind):
    """Return the names of a kind (missing, extra or misshapen) in the error on loading `state`."""
    with pytest.raises(WeightsError) as error:
        mp.load_torch(state, num_heads=4)
    listed = re.search(rf"{kind}: (.*?)(?:; (?:missing|extra|misshapen|not )|\. Expected)", str(error.value))
    assert listed, str(error.value)
    return re.findall(r"(?:^|, )([a-z]\w*(?:\.\w+)*)", listed.group(1))


@pytest.mark.parametrize("damage", [
    pytest.param(None, id="missing"),
    pytest.param(lambda array: array[..., None], id="one dimension more"),
    pytest.param(lambda array: array.sum(0), id="one dimension fewer"),
    pytest.param(lambda array: np.concatenate([array, array[:1]]), id="longer"),
    pytest.param(lambda array: array[..., :-1], id="narrower"),
    pytest.param(lambda array: np.repeat(array, 4, 0), id="four times as long"),
    pytest.param(lambda array: array[:0], id="empty"),
])  # fmt: skip
def test_one_damaged_entry_is_named_whichever_it_is(state, damage):
    """Also if sizes are inferred from the entry, and beside a stray entry, which is named too."""
    for name, array in state.items():
        bad = {**state, "scheduler.betas": np.zeros(3, np.float32)}
        if damage is None:
            del bad[name]
        else:
            bad[name] = damage(array)
        if damage is not None and bad[name].shape == array.shape:
            continue
        if name == "y_embedder.embedding_table.weight" and bad.get(name, array).ndim == 2 and damage is not None:
            rows, columns = bad[name].shape
            if rows > 1 and columns % 48 == 0:
                continue  # a valid model with other classes or class tokens
        assert named(bad, "extra") == ["scheduler.betas"], name
        assert named(bad, "missing" if damage is None else "misshapen") == [name]


def test_several_damaged_entries_are_all_named(state):
    gone = ["downsample_blocks.0.attn.qkv.bias", "final_layer.linear.weight", "y_embedder.embedding_table.weight"]
    bad = {name: array for name, array in state.items() if name not in gone}
    wrong = ["x_embedder.proj.weight", "time_modulation.1.weight", "downsample_blocks.0.mlp.fc1.weight"]
    bad.update({name: state[name][:-1] for name in wrong})
    assert sorted(named(bad, "missing")) == gone
    assert sorted(named(bad, "misshapen")) == sorted(wrong)


def test_not_our_model():
    with pytest.raises(WeightsError, match=r"missing: x_embedder\.proj\.weight.*extra: conv\.weight.*has 1 entries"):
        mp.load_torch({"conv.weight": np.zeros((3, 3), np.float32)})
    with pytest.raises(WeightsError, match="such as none"):
        mp.load_torch({})


def test_nan_weights_are_named(state):
    bad = {**state, "final_layer.linear.bias": np.full_like(state["final_layer.linear.bias"], np.nan)}
    with pytest.raises(WeightsError, match=r"not finite: final_layer\.linear\.bias"):
        mp.load_torch(bad, num_heads=4)


def test_positions_that_are_not_sin_cos(state):
    bad = {**state, "pos_embed": state["pos_embed"] + 1}
    with pytest.raises(WeightsError, match="position table"):
        mp.load_torch(bad, num_heads=4)
    # The tolerance is larger for a table of a half-precision file.
    half = {name: array.astype(np.float16) for name, array in state.items()}
    mp.load_torch(half, num_heads=4)
    with pytest.raises(WeightsError, match="position table"):
        mp.load_torch({**state, "pos_embed": state["pos_embed"] + np.float32(1e-3)}, num_heads=4)


def test_safetensors(state, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(state, path)
    assert_same(state, mp.to_torch(mp.load_torch(path, num_heads=4)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        mp.load_torch(path, num_heads=4)


def test_files_that_are_not_weights(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        mp.load_torch(tmp_path / "nowhere.safetensors")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"unknown type '\.h5'"):
        mp.load_torch(tmp_path / "weights.h5")


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"mpdit_jax with its extra \[torch\]"):
        files.read_state_dict(path)


@pytest.mark.parity
def test_torch_files(golden, state, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for content in (
        tensors,
        {"ema": tensors, "model": zeros, "epoch": 3},
        {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}},
        {"model": zeros, "ema": tensors, "opt": {"lr": 1e-4}, "args": argparse.Namespace(epochs=80)},
    ):
        torch.save(content, tmp_path / "model.pt")
        assert_same(state, mp.to_torch(mp.load_torch(tmp_path / "model.pt", num_heads=4)))
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "half.pth")
    assert mp.load_torch(tmp_path / "half.pth", num_heads=4).config.hidden_size == 48


@pytest.mark.parity
def test_a_pickle_that_carries_code_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return marker.touch, ()

    torch.save({"ema": {"x": Malicious()}}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match=r"evil\.pt holds more than tensors \(\S*getattr\) and was not loaded"):
        mp.load_torch(tmp_path / "evil.pt")
    assert not marker.exists()
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(WeightsError, match=r"junk\.pt"):
        mp.load_torch(tmp_path / "junk.pt")


@pytest.mark.parametrize(("width", "ratio", "size"), [(28, 2.2, 61), (44, 0.7, 30), (32, 3.0, 96)])
def test_any_mlp_width_survives(width, ratio, size):
    small = {"hidden_size": width, "num_heads": 2, "depths": (1, 1), "input_size": 8, "num_classes": 3}
    model = mp.create_model("mpdit_b", mlp_ratio=ratio, **small)
    assert model.config.mlp_size == size
    assert mp.load_torch(mp.to_torch(model), num_heads=2).config.mlp_size == size
