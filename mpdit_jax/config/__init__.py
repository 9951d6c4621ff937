"""The config of an experiment: fields, checks, command-line flags, the paper's ablation rows."""

from mpdit_jax.config.base import (
    base_config,
    defaults,
    differences,
    facts,
    from_json,
    leave_out_idle,
    model_of,
    resolve,
    to_json,
    what_is_read,
)

__all__ = [
    "base_config",
    "defaults",
    "differences",
    "facts",
    "from_json",
    "leave_out_idle",
    "model_of",
    "resolve",
    "to_json",
    "what_is_read",
]
