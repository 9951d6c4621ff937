"""Configs that are stored and read again, also those of 0.1.0."""

import json

import pytest

from mpdit_jax.config import base_config, differences, from_json, model_config, resolve, to_json
from mpdit_jax.errors import ConfigError


def test_a_config_survives_being_stored():
    config = resolve(base_config())
    assert from_json(to_json(config)) == config


def test_a_run_of_a_version_without_some_fields_stays_readable():
    stored = json.loads(to_json(resolve(base_config())))
    del stored["profile"], stored["model"]["convention"], stored["optimizer"]["clip_norm"]
    config = from_json(json.dumps(stored))
    assert config == resolve(base_config())
    assert model_config(config).convention == "velocity"


def test_the_average_warms_up_in_new_runs_and_not_in_those_stored_without_the_field():
    assert base_config().ema.warmup
    stored = json.loads(to_json(resolve(base_config())))
    del stored["ema"]
    assert not from_json(json.dumps(stored)).ema.warmup


def test_label_dropout_decides_whether_there_is_a_null_class():
    """Stored configs without the field are read alike."""
    config = base_config()
    assert resolve(config).model.null_class
    config.label_dropout = 0.0
    stored = json.loads(to_json(resolve(config)))
    assert stored["model"].pop("null_class") is False
    assert from_json(json.dumps(stored)) == resolve(config)
    assert differences(from_json(json.dumps(stored)), resolve(config)) == {}
    config.model.null_class = True
    with pytest.raises(ConfigError, match=r"model\.null_class=True: leave it out, config\.label_dropout decides it"):
        resolve(config)


@pytest.mark.parametrize("field", [{"fno_width": 64}, {"class_tokens": 1}])
def test_a_switch_without_effect_is_refused(field):
    config = base_config()
    config.model.preset = "dit_b_2"
    config.model.update(field)
    with pytest.raises(ConfigError, match=r"model\.(fno_width=64|class_tokens=1) would change nothing"):
        resolve(config)


def test_a_field_of_a_newer_version_is_refused():
    stored = json.loads(to_json(resolve(base_config())))
    stored["model"]["wavelets"] = 3
    with pytest.raises(ConfigError, match=r"unknown config key config\.model\.wavelets"):
        from_json(json.dumps(stored))


def test_what_changes_no_number_may_be_another_when_a_run_continues():
    before, after = base_config(), base_config()
    after.data.threads, after.data.path = 4, "/elsewhere"
    assert differences(resolve(before), resolve(after)) == {}
    after.data.max_examples = 5
    assert differences(resolve(before), resolve(after)) == {"data.max_examples": (0, 5)}
    after.data.threads = 0
    with pytest.raises(ConfigError, match=r"config\.data\.threads=0: expected 1 or more"):
        resolve(after)
