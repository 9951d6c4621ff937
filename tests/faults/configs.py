"""Configs of a tiny training with some fields replaced."""

from ml_collections import ConfigDict

from mpdit_jax.config import defaults

TINY = {
    "steps": 1, "batch_size": 4, "data.split": "all", "sample.every": 0, "model.patch_sizes": (2, 1),
    "model.depths": (1, 1), "model.hidden_size": 16, "model.num_heads": 2, "model.input_size": (8, 8),
    "model.in_channels": 1, "model.num_classes": 10, "model.class_tokens": 2,
    "model.time_embedding": "sinusoidal",
}  # fmt: skip


def mutated(changes):
    """The tiny config with some fields replaced, as a config file that checks nothing would give it."""
    tree = {}
    for path, value in {**defaults(), **TINY, **changes}.items():
        *groups, field = path.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                return None
        place[field] = value
    return ConfigDict(tree)
