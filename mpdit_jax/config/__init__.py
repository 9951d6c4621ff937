"""The config of an experiment: fields, checks, command-line flags, the paper's ablation rows."""

from mpdit_jax.config.base import (
    base_config,
    data_identity,
    defaults,
    differences,
    facts,
    from_json,
    leave_out_idle,
    model_config,
    resolve,
    to_json,
)

__all__ = [
    "base_config",
    "data_identity",
    "defaults",
    "differences",
    "facts",
    "from_json",
    "leave_out_idle",
    "model_config",
    "resolve",
    "to_json",
]
