"""Settings that have no effect in combination with the others; the start of a run names them."""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import FrozenConfigDict

from mpdit_jax.config.base import defaults


class _Rule(NamedTuple):
    fields: tuple[str, ...]  # paths, or the beginning of paths with a dot at the end
    condition: str  # what the fields need, in words
    holds: Callable[[FrozenConfigDict], bool]


_RULES = (
    _Rule(
        ("optimizer.decay_steps", "optimizer.end_learning_rate"), "config.optimizer.schedule='cosine' or 'linear'",
        lambda config: config.optimizer.schedule != "constant",
    ),
    _Rule(("flow_map.",), "config.objective='flow_map'", lambda config: config.objective == "flow_map"),
    _Rule(("mask_loss_weight",), "config.mask_ratio above 0", lambda config: config.mask_ratio > 0),
    _Rule(
        ("time.mean", "time.std"), "config.time.distribution='logit_normal'",
        lambda config: config.time.distribution == "logit_normal",
    ),
    _Rule(
        ("data.normalization", "sample.vae"), "config.data.name='latents'",
        lambda config: config.data.name == "latents",
    ),
    _Rule(
        ("flow_map.guidance_until",), "config.flow_map.guidance above 0 or config.model.guidance_max above 1",
        lambda config: config.flow_map.guidance > 0 or config.model.guidance_max > 1,
    ),
    _Rule(("profile.start",), "config.profile.steps above 0", lambda config: config.profile.steps > 0),
    _Rule(
        ("sample.solver", "sample.steps", "sample.guidance_scale", "sample.per_class"), "config.sample.every above 0",
        lambda config: config.sample.every > 0,
    ),
    _Rule(
        ("sample.vae",), "config.sample.every or config.eval.every above 0",
        lambda config: config.sample.every > 0 or config.eval.every > 0,
    ),
    _Rule(("eval.",), "config.eval.every above 0", lambda config: config.eval.every > 0),
    _Rule(("data.path",), "another config.data.name than 'digits'", lambda config: config.data.name != "digits"),
    _Rule(
        ("data.split",), "config.data.name='digits' or 'fashion_mnist' (other data have no splits)",
        lambda config: config.data.name in ("digits", "fashion_mnist") or config.data.split in ("train", "all"),
    ),
    _Rule(
        ("eval.inception", "eval.preprocessing"), "config.eval.features='inception'",
        lambda config: not config.eval.every or config.eval.features == "inception",
    ),
    _Rule(
        ("eval.classifier_steps",), "config.eval.features='classifier'",
        lambda config: not config.eval.every or config.eval.features == "classifier",
    ),
)  # fmt: skip


def without_effect(config: FrozenConfigDict) -> str:
    """Return a sentence that names the fields which differ from their defaults and have no effect; "" for none.

    Args:
        config: resolved, see `resolve`.
    """
    found = []
    for path, default in defaults().items():
        *groups, field = path.split(".")
        group = config
        for name in groups:
            group = group[name]
        for rule in _RULES:
            mine = any(path == one or (one.endswith(".") and path.startswith(one)) for one in rule.fields)
            if mine and group[field] != default and not rule.holds(config):
                found.append(f"config.{path}={group[field]!r} needs {rule.condition}")
    return f"without effect: {'; '.join(found)}" if found else ""
