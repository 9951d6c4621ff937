"""A run says which of its settings have no effect."""

import pytest

from mpdit_jax.config.ablation import ABLATIONS
from mpdit_jax.config.base import base_config, defaults, resolve
from mpdit_jax.config.effects import _RULES, without_effect
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
    ({"eval.classifier_steps": 9}, "config.eval.classifier_steps=9 needs config.eval.every above 0"),
    ({"sample.every": 0, "sample.steps": 9}, "config.sample.steps=9 needs config.sample.every above 0"),
    ({"sample.every": 0, "eval.every": 5, "data.name": "latents", "sample.vae": "V"}, ""),
    ({"sample.every": 0, "data.name": "latents", "sample.vae": "V"}, "config.sample.vae='V' needs config.sample.every"),
    ({"profile.start": 9}, "config.profile.start=9 needs config.profile.steps above 0"),
    ({"objective": "flow_map", "flow_map.guidance_until": 0.5}, "config.flow_map.guidance_until=0.5 needs config.flow"),
    ({"objective": "flow_map", "flow_map.guidance_until": 0.5, "model.guidance_max": 2.0}, ""),
    ({"eval.every": 5, "eval.classifier_steps": 9}, "config.eval.classifier_steps=9 needs config.eval.features='class"),
    ({"eval.every": 5, "eval.features": "classifier", "eval.inception": "x"}, "config.eval.inception='x' needs"),
    ({}, ""),
])  # fmt: skip
def test_settings_without_effect_are_named(fields, sentence):
    said = without_effect(changed(fields))
    assert said.startswith(f"without effect: {sentence}") if sentence else said == ""


ALWAYS = {
    "batch_size", "checkpoint.every", "checkpoint.grace", "checkpoint.keep", "checkpoint.keep_every",
    "data.class_balance", "data.max_examples", "data.name", "data.threads", "ema.warmup", "ema_decay",
    "gradient_accumulation", "guard.abort_after", "guard.spike_factor", "init_from", "label_dropout", "log.every",
    "log.wandb_project", "mask_ratio", "mesh.data", "mesh.fsdp", "objective", "optimizer.b1", "optimizer.b2",
    "optimizer.clip_norm", "optimizer.eps", "optimizer.learning_rate", "optimizer.name", "optimizer.schedule",
    "optimizer.warmup_steps", "optimizer.weight_decay", "profile.steps", "sample.every", "seed", "steps",
    "time.distribution", "trunk_drop",
}  # fmt: skip


def test_every_field_has_a_rule_or_always_has_an_effect():
    """Fields of the model are refused where they would change nothing; see test_mpdit.py."""
    named = [field for rule in _RULES for field in rule.fields]
    for path in defaults():
        ruled = any(path == field or (field.endswith(".") and path.startswith(field)) for field in named)
        # eval.every and the like are the conditions of their own groups' rules.
        assert ruled != (path in ALWAYS) or path.startswith("model."), path


def test_shipped_configs_have_none():
    names = [name for name in shipped_configs() if name not in ("ablation", "vae_fashion")]
    for name in [*names, *(f"ablation:{row}" for row in ABLATIONS)]:
        assert without_effect(resolve(load_config_file(name))) == "", name
