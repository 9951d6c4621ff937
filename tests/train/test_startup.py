"""What a run checks, loads and says before its first step."""

import json
import shlex

import jax
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

import mpdit_jax as mp
from mpdit_jax.checkpoint.workdir import lock_workdir
from mpdit_jax.config import base_config, resolve, to_json
from mpdit_jax.data.sources import load_digits
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import CheckpointError
from mpdit_jax.sample.__main__ import make_sample_parser
from mpdit_jax.train.__main__ import how_to_draw
from mpdit_jax.train.jax_flags import FLAGS_FILE, number_flags, record_flags
from mpdit_jax.train.startup import continued, describe_average, log_startup
from mpdit_jax.vae import PIXELS


def config_with(**fields):
    """The default config with some fields, such as sample__every=5, of a model of one block."""
    config = base_config()
    config.model.update({"depths": (1,), "patch_sizes": (2,), "hidden_size": 16, "num_heads": 2})
    for path, value in fields.items():
        *groups, name = path.split("__")
        group = config
        for part in groups:
            group = group[part]
        group[name] = value
    return resolve(config)


@pytest.mark.parametrize(("decay", "steps", "warmup", "share"), [
    (0.9999, 500, False, "95%"),
    (0.999, 1_500, False, "22%"),
    (0.999, 3_000, False, ""),
    (0.9999, 500, True, ""),
])  # fmt: skip
def test_an_average_that_keeps_its_first_weights_is_announced(decay, steps, warmup, share):
    said = describe_average(config_with(ema_decay=decay, steps=steps, ema__warmup=warmup))
    assert bool(said) == bool(share)
    if share:
        assert f"still hold {share} of the initial weights (config.ema_decay={decay}, config.ema.warmup=False)" in said
        assert "--no_ema" in said


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"data__name": "latents"}, "draws no grids of latents without their VAE: give --config.sample.vae=FOLDER"),
    ({"data__name": "arrays"}, "draws no grids: these images have 4 channels"),
    ({"data__name": "latents", "sample__every": 0}, ""),
    ({"data__name": "arrays", "model__in_channels": 3}, ""),
])  # fmt: skip
def test_grids_that_cannot_be_drawn_are_announced(tmp_path, capsys, fields, sentence):
    mesh = make_mesh(devices=jax.devices()[:1])
    log_startup(config_with(**fields), tmp_path, 0, load_digits(), mesh, None, False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("starting at step 0")
    assert len(lines) == 1 + bool(sentence)
    assert sentence in lines[-1]


@pytest.mark.parametrize(("flag", "value", "remedy"), [
    ("jax_enable_x64", True, "JAX_ENABLE_X64=False"),
    ("jax_default_matmul_precision", "highest", "no JAX_DEFAULT_MATMUL_PRECISION"),
    ("jax_default_prng_impl", "rbg", "JAX_DEFAULT_PRNG_IMPL=threefry2x32"),
    ("jax_threefry_partitionable", False, "JAX_THREEFRY_PARTITIONABLE=True"),
])  # fmt: skip
def test_a_run_continues_under_its_own_jax_flags(tmp_path, monkeypatch, flag, value, remedy):
    record_flags(tmp_path, trained=True)  # a run of 0.1.0 has no record
    before = number_flags()[flag]
    jax.config.update(flag, value)
    try:
        with pytest.raises(CheckpointError) as refused:
            record_flags(tmp_path, trained=True)
        record_flags(tmp_path / "new", trained=False)
    finally:
        jax.config.update(flag, before)
    assert f"was trained with {flag}={before} and not {value}" in str(refused.value)
    assert f"continue it with {remedy} in the environment" in str(refused.value)
    record_flags(tmp_path, trained=True)
    (tmp_path / FLAGS_FILE).write_text("[")
    with pytest.raises(CheckpointError, match="is damaged"):
        record_flags(tmp_path, trained=True)


def test_a_run_says_that_it_continues_with_other_rounding(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    record_flags(tmp_path, trained=False)
    record_flags(tmp_path, trained=True)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.delenv("XLA_FLAGS")
    record_flags(tmp_path, trained=True)
    assert capsys.readouterr().out.splitlines() == [
        "XLA_FLAGS is not set now and was --xla_one: results may differ in rounding",
        "NVIDIA_TF32_OVERRIDE is 1 now and was not set: results may differ in rounding",
    ]
    record_flags(tmp_path, trained=True)
    assert capsys.readouterr().out == ""


def test_a_run_without_the_field_goes_on_without_a_warm_up(tmp_path, capsys):
    config = config_with()
    stored = json.loads(to_json(config))
    del stored["ema"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert continued(config, tmp_path) == config  # there is no checkpoint to continue
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    expected = ConfigDict(config)
    expected.ema.warmup = False
    assert continued(config, tmp_path) == FrozenConfigDict(expected)
    assert capsys.readouterr().out == f"{tmp_path} was started without config.ema.warmup, and goes on without it\n"
    (tmp_path / "config.json").write_text(to_json(config))
    assert continued(config, tmp_path) == config


@pytest.fixture
def workdir(tmp_path):
    """The stored config of a run, and the names of its checkpoints."""
    (tmp_path / "run/checkpoints/800").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text(to_json(config_with()))
    return tmp_path / "run"


@pytest.mark.parametrize(("fields", "way"), [
    ({"optimizer__learning_rate": 1e-5}, True),
    ({"model__num_classes": 7, "model__input_size": (16, 16)}, True),
    ({"model__hidden_size": 32}, False),
])  # fmt: skip
def test_a_refused_config_is_told_how_to_start_from_the_weights(workdir, fields, way):
    with (
        pytest.raises(CheckpointError, match="holds a run of another config") as refused,
        lock_workdir(workdir, config_with(**fields)),
    ):
        pass
    assert (f"(with --config.init_from={workdir} it starts from this run's weights)" in str(refused.value)) == way


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/800", "checkpoints/800/ema_parameters"])
def test_a_folder_among_the_checkpoints_is_no_workdir(workdir, place):
    with pytest.raises(CheckpointError, match=f"checkpoints of the run {workdir}: give that folder as workdir"):
        mp.load_checkpoint(workdir / place)
    with (
        pytest.raises(CheckpointError, match=f"give --workdir={workdir} to continue it"),
        lock_workdir(workdir / place, config_with()),
    ):
        pass


@pytest.mark.parametrize(("fields", "fingerprint", "words"), [
    ({"model__in_channels": 3, "model__num_classes": 10}, None, ""),
    ({"data__name": "latents", "model__num_classes": 10}, PIXELS, ""),
    ({"data__name": "latents", "model__num_classes": 10}, "5d", " --vae=FOLDER"),
    ({"data__name": "latents", "sample__vae": "my vae"}, "5d", " '--vae=my vae' --labels=0,1,2,3,4,5,6,7"),
    ({"model__in_channels": 1, "objective": "flow_map", "model__depths": (2,)}, None, " --solver=flow_map --steps=4"),
])  # fmt: skip
def test_the_printed_command_draws_from_the_run(workdir, fields, fingerprint, words):
    (workdir / "config.json").write_text(to_json(config_with(**fields)))
    latents = fingerprint and {"mean": [0.0], "std": [1.0], "vae_fingerprint": fingerprint}
    (workdir / "data.json").write_text(json.dumps({"class_names": [], "latents": latents, "labels": None}))
    line = how_to_draw(workdir)
    assert f" --workdir={workdir}{words}" in line
    assert ("--vae" in line) == ("--vae" in words)
    make_sample_parser().parse_args(shlex.split(line.partition("mpdit_jax.sample")[2]))


def test_the_package_is_the_function():
    from mpdit_jax.train import train

    assert train is not None
    assert callable(mp.train)
    assert train.__func__ is type(mp.train).__call__
    assert "Args:" in train.__doc__
