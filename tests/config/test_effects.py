"""A run says which of its settings have no effect."""

import pytest

from mpdit_jax.config.ablation import ABLATIONS
from mpdit_jax.config.base import base_config, resolve
from mpdit_jax.config.effects import without_effect
from mpdit_jax.config.flags import load_config_file, shipped_configs


def changed(fields):
    config = base_config()
    for path, value in fields.items():
        *groups, field = path.split(".")
        group = config
        for name in groups:
            group = group[name]
        group[field] = value
    return resolve(config)


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"optimizer.decay_steps": 500}, "config.optimizer.decay_steps=500 needs config.optimizer.schedule='cosine'"),
    ({"optimizer.decay_steps": 500, "optimizer.schedule": "cosine"}, ""),
    ({"flow_map.p": 0.0}, "config.flow_map.p=0.0 needs config.objective='flow_map'"),
    ({"mask_loss_weight": 0.2}, "config.mask_loss_weight=0.2 needs config.mask_ratio above 0"),
    ({"time.distribution": "uniform", "time.std": 2.0}, "config.time.std=2.0 needs config.time.distribution='log"),
    ({"data.normalization": "manifest"}, "config.data.normalization='manifest' needs config.data.name='latents'"),
    ({"data.path": "mine"}, "config.data.path='mine' needs another config.data.name than 'digits'"),
    ({"data.name": "arrays", "data.path": "mine.npz", "data.split": "test"}, "config.data.split='test' needs"),
    ({"eval.classifier_steps": 9}, ""),
    ({"eval.every": 5, "eval.classifier_steps": 9}, "config.eval.classifier_steps=9 needs config.eval.features='class"),
    ({"eval.every": 5, "eval.features": "classifier", "eval.inception": "x"}, "config.eval.inception='x' needs"),
    ({}, ""),
])  # fmt: skip
def test_settings_without_effect_are_named(fields, sentence):
    said = without_effect(changed(fields))
    assert said.startswith(f"without effect: {sentence}") if sentence else said == ""


def test_shipped_configs_have_none():
    names = [name for name in shipped_configs() if name not in ("ablation", "vae_fashion")]
    for name in [*names, *(f"ablation:{row}" for row in ABLATIONS)]:
        assert without_effect(resolve(load_config_file(name))) == "", name
