import argparse
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

import mpdit_jax as mp
from mpdit_jax.errors import InputError, MissingExtraError, WeightsError, WeightsWarning
from mpdit_jax.interop import files
from mpdit_jax.interop.native_files import save_native
from mpdit_jax.sample.exporting import export_sampler

TABLE = "y_embedder.embedding_table.weight"


@pytest.fixture
def state(golden):
    return golden.group("state/")


@pytest.fixture
def raw(state):
    """Other weights than `state`, which stand for the parameters beside their moving average."""
    return {name: array if name.startswith("pos_embed") else array * 0 for name, array in state.items()}


def within(prefix, state):
    return {f"{prefix}.{name}": array for name, array in state.items()}


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
    """The entry is named even if sizes are inferred from it, and so is a stray entry beside it."""
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


@pytest.mark.parametrize(("average", "note"), [
    ("ema", None),
    ("model_ema1", r"the moving average 'model_ema1' is taken; key=… .convert: --key. selects another: 'model'"),
    ("ema_model", "the moving average 'ema_model' is taken"),
    ("state_dict_ema", "the moving average 'state_dict_ema' is taken"),
    ("averaged_model", "the moving average 'averaged_model' is taken"),
    *((name, f"the moving average '{name}' is taken") for name in (
        "emaModel", "EMAModel", "modelEMA", "model_EMA", "EMA", "emamodel", "ema1", "params_ema", "g_ema", "netEma",
        "shadow", "shadow_params", "swa_model", "swaModel", "SWA", "averaging", "model_avg", "avg_model", "polyak",
    )),
])  # fmt: skip
def test_the_moving_average_of_a_checkpoint_is_taken(state, raw, average, note, recwarn):
    """A warning names a key other than "ema"."""
    content = {"model": raw, average: state, "optimizer": {"state": {0: {"exp_avg": raw}}}, "ema_decay": 0.999}
    assert_same(state, mp.to_torch(mp.load_torch(content, num_heads=4)))
    assert [bool(re.search(note, str(one.message))) for one in recwarn] == [True] * bool(note)
    assert_same(raw, mp.to_torch(mp.load_torch(content, num_heads=4, key="model")))


@pytest.mark.parametrize("name", ["schema", "cinema", "remat", "exp_avg", "teacher", "emailed", "swap"])
def test_what_is_taken_beside_another_network_is_named(state, raw, name, recwarn):
    """A name that is not that of an average may still be one, so that the choice is said."""
    content = {"model": raw, name: state, "rng": {"cpu": np.zeros(3)}, "optimizer": {"exp_avg": state}}
    assert_same(raw, mp.to_torch(mp.load_torch(content, num_heads=4)))
    sentence = f"'model' is taken, by its name no moving average; key=… (convert: --key) selects another: '{name}'."
    assert [str(one.message) for one in recwarn] == [f"state dict: {sentence}"]


@pytest.mark.parametrize(("content", "key"), [
    (lambda state, raw: {"model": raw, "ema": {"decay": np.float32(0.9), "num_updates": 3, "shadow": state}}, "ema"),
    (lambda state, raw: {"model": raw, "emaModel": {"module": state}}, "emaModel"),
    (lambda state, raw: {"state": {"model": raw, "ema": state}, "epoch": 3}, "state.ema"),
    (lambda state, raw: {"model": raw, "ema": state | {"decay": 0.9, "num_updates": np.int64(3)}}, "ema"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*(is taken|left out)")
def test_an_average_that_is_nested_once_more_is_found(state, raw, content, key):
    content = content(state, raw)
    for chosen in (None, key):
        assert_same(state, mp.to_torch(mp.load_torch(content, num_heads=4, key=chosen)))


def test_an_average_in_an_entry_of_another_name_is_found(state, raw):
    with pytest.warns(WeightsWarning, match=r"the moving average 'extra\.ema' is taken"):
        assert_same(state, mp.to_torch(mp.load_torch({"model": raw, "extra": {"ema": state}}, num_heads=4)))


def test_two_networks_whose_names_become_equal_are_refused(state, raw):
    both = state | {f"_orig_mod.{name}": array for name, array in raw.items()}
    with pytest.raises(WeightsError, match="is there twice, once as '_orig_mod"):
        mp.load_torch(both, num_heads=4)


def test_an_average_that_is_not_there_is_named(state):
    with pytest.warns(WeightsWarning, match="'ema' holds no state dict; 'model' is taken, which is no moving average"):
        assert_same(state, mp.to_torch(mp.load_torch({"model": state, "ema": None}, num_heads=4)))


@pytest.mark.parametrize(("names", "key", "sentence"), [
    (("ema1", "ema2"), None, r"several moving averages \(ema1, ema2\): choose one by key, such as key='ema1'"),
    (("first", "second"), None, r"several state dicts \(first, second\): choose one"),
    (("model", "ema"), "moving", r"key='moving': state dict has no such state dict; it has model, ema"),
])  # fmt: skip
def test_a_state_dict_is_not_guessed(state, raw, names, key, sentence):
    content = dict(zip(names, (raw, state), strict=True))
    with pytest.raises(WeightsError, match=sentence):
        mp.load_torch(content, num_heads=4, key=key)
    assert_same(state, mp.to_torch(mp.load_torch(content, num_heads=4, key=names[1])))


@pytest.mark.parametrize("part", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_of_a_model_or_a_block_do_not_matter(state, part):
    wrapped = {re.sub(r"^|(?<=blocks\.0\.)", f"{part}.", name): array for name, array in state.items()}
    assert_same(state, mp.to_torch(mp.load_torch(wrapped, num_heads=4)))


@pytest.mark.parametrize(("prefix", "beside", "left_out"), [
    ("", {"projectors.0.0.weight": np.zeros((2, 2))}, r"projectors\.0\.0\.weight left out"),  # REPA
    ("", {"n_averaged": np.int64(3)}, "n_averaged left out"),  # AveragedModel
    ("", {"decay": 0.999, "num_updates": np.int64(3)}, "decay and 1 more entries left out"),  # LitEma
    ("model.", {"vae.x": np.zeros(2), "vae.y": np.zeros(2)}, r"vae\.x and 1 more entries left out"),  # Lightning
    ("ema_model.module.", {"initted": np.True_, "step": np.int64(3)}, "initted and 1 more entries left out"),
])  # fmt: skip
def test_what_lies_beside_a_network_is_left_out(state, prefix, beside, left_out):
    content = {f"{prefix}{name}": array for name, array in state.items()} | beside
    with pytest.warns(WeightsWarning, match=left_out):
        assert_same(state, mp.to_torch(mp.load_torch({"state_dict": content, "epoch": 3}, num_heads=4)))


def test_one_of_the_networks_of_a_module_is_chosen_as_one_of_a_checkpoint_is(state, raw):
    content = within("ema_model", state) | within("online_model", raw)
    with pytest.warns(WeightsWarning, match="the moving average 'ema_model' is taken"):
        assert_same(state, mp.to_torch(mp.load_torch(content, num_heads=4)))
    with pytest.warns(WeightsWarning, match="left out"):
        assert_same(raw, mp.to_torch(mp.load_torch({"state_dict": content}, num_heads=4, key="online_model")))
    with pytest.raises(WeightsError, match="key='other': state dict has no such state dict; it has ema_model"):
        mp.load_torch(content, num_heads=4, key="other")


def test_a_class_table_may_have_no_null_class(state):
    """Ten rows may be ten classes, or nine and the null class, so that the number is asked for."""
    ten = {**state, TABLE: state[TABLE][:10]}
    with pytest.raises(WeightsError, match=r"has 10 rows .* give num_classes=10 if .*, or 9 if"):
        mp.load_torch(ten, num_heads=4)
    with pytest.raises(
        WeightsError, match=r"num_classes=12: state dict has 10 rows in its class table; expected 9, or 10"
    ):
        mp.load_torch(ten, num_heads=4, num_classes=12)
    assert mp.load_torch(ten, num_heads=4, num_classes=9).config.null_class
    model = mp.load_torch(ten, num_heads=4, num_classes=10)
    assert (model.config.num_classes, model.config.null_class) == (10, False)
    assert_same(ten, mp.to_torch(model))
    key = jax.random.key(0)
    for scale, labels, more in ((2.0, [3], {}), (2.0, [3], {"negative_labels": {4: 5}}), (1.0, [10], {})):
        with pytest.raises(InputError, match="null class, label 10, was not trained"):
            mp.make_sampler(steps=1, guidance_scale=scale)(model, labels, key, **more)
    with pytest.raises(InputError, match="null class, label 10, was not trained"):
        export_sampler(mp.make_sampler(steps=1, guidance_scale=2.0), model, ("cpu",), 1)
    mp.make_sampler(steps=1, guidance_scale=2.0)(model, [3], key, negative_labels={3: 5})
    mp.make_sampler(steps=1, guidance_scale=2.0)(model, [3], key, guide=model)


@pytest.mark.parametrize(("rows", "said"), [(7, True), (9, True), (11, False)])
def test_an_unusual_class_table_is_taken_to_have_a_null_class_and_that_is_said(state, rows, said, tmp_path, recwarn):
    few = {**state, TABLE: state[TABLE][:rows]}
    model = mp.load_torch(few, num_heads=4)
    sentence = (
        f"state dict has {rows} rows in its class table: its last row is taken for the null class. If it was trained "
        f"without label dropout, give num_classes={rows}; {rows - 1} confirms the null class (convert: --num_classes)."
    )
    assert [str(one.message) for one in recwarn] == [sentence] * said
    save_native(tmp_path / "model.safetensors", model, 1)
    for source, more in ((few, {"num_classes": rows - 1}), (tmp_path / "model.safetensors", {})):
        recwarn.clear()
        assert mp.load_torch(source, **({"num_heads": 4} | more)).config.num_classes == rows - 1
        assert not recwarn.list


@pytest.mark.parity
def test_torch_files(golden, state, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for content in (
        tensors,
        {"ema": tensors, "model": zeros, "epoch": 3},
        {"model_ema": tensors, "model": zeros},
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
