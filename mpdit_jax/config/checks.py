"""Validation of a config: its fields and their types, then its values."""

import sys
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mpdit_jax.config.evaluation import check_eval
from mpdit_jax.data.latents import NORMALIZATIONS
from mpdit_jax.errors import ConfigError
from mpdit_jax.flow.objective import TIME_DISTRIBUTIONS
from mpdit_jax.io.paths import check_local
from mpdit_jax.validation import suggest

OBJECTIVES = ("flow_matching", "flow_map")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine", "linear")
_LARGEST_BATCH = 2**20  # a larger one is a slip that would end in an out-of-memory error
_TYPES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    tuple: "values with commas between them",
}
_AT_LEAST_1 = (
    "batch_size", "steps", "gradient_accumulation", "checkpoint.every", "checkpoint.keep", "data.threads", "log.every",
    "sample.steps", "sample.per_class", "guard.abort_after",
)  # fmt: skip
_AT_LEAST_0 = (
    "seed", "checkpoint.keep_every", "checkpoint.grace", "sample.every", "sample.guidance_scale",
    "optimizer.weight_decay", "optimizer.warmup_steps", "optimizer.decay_steps", "optimizer.end_learning_rate",
    "optimizer.clip_norm", "guard.spike_factor", "data.max_examples", "profile.start", "profile.steps",
    "mask_loss_weight",
)  # fmt: skip


def check_fields(config: ConfigDict, base: ConfigDict, path: str) -> None:
    """Raise ConfigError for unknown and missing fields and wrong types, which ConfigDict checks on assignment only."""
    for key in config:
        if key not in base:
            raise ConfigError(f"unknown config key {path}.{key}{suggest(key, list(base))}.")
    for key, default in base.items():
        if key not in config:
            raise ConfigError(
                f"config key {path}.{key} is missing; start the config from mpdit_jax.config.base_config()."
            )
        value = config[key]
        if isinstance(default, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise ConfigError(f"{path}.{key}={value!r}: expected a group of fields ({', '.join(default)}).")
            check_fields(value, default, f"{path}.{key}")
        elif default is not None:
            _check_type(f"{path}.{key}", value, type(default))


def _check_type(path: str, value: Any, kind: type) -> None:
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{path}={value!r}: expected {_TYPES[kind]}.")
    if kind is str:
        check_local(f"{path}={value}", ConfigError)
    if kind is float and not abs(value) <= sys.float_info.max:  # a whole number may be larger than any float
        raise ConfigError(f"{path}={value!r}: expected a finite number.")


def check_values(config: ConfigDict) -> None:
    """Raise ConfigError for an impossible value in a config whose fields and types are right."""
    for path in _AT_LEAST_1:
        expect(config, path, _get(config, path) >= 1, "1 or more")
    for path in _AT_LEAST_0:
        expect(config, path, _get(config, path) >= 0, "0 or more")
    expect(config, "seed", config.seed < 2**32, "below 2**32")
    expect(config, "batch_size", config.batch_size <= _LARGEST_BATCH, f"{_LARGEST_BATCH:,} at most")
    for path, value in leaves(config.to_dict()):
        if isinstance(value, int) and path != "seed":
            expect(config, path, value < 2**31, "below 2**31, the limit of 32-bit counters")
    expect(config, "checkpoint.grace", config.checkpoint.grace <= 10**7, "seconds, at most 10,000,000")
    for path in ("optimizer.learning_rate", "optimizer.eps", "time.std"):
        expect(config, path, _get(config, path) > 0, "a positive number")
    for path in ("ema_decay", "optimizer.b1", "optimizer.b2", "mask_ratio", "trunk_drop"):
        expect(config, path, 0 <= _get(config, path) < 1, "at least 0 and below 1")
    expect(config, "label_dropout", 0 <= config.label_dropout <= 1, "between 0 and 1")
    divides = config.batch_size % config.gradient_accumulation == 0
    expect(config, "gradient_accumulation", divides, f"a divisor of batch_size={config.batch_size}")
    factor = config.guard.spike_factor
    expect(config, "guard.spike_factor", factor == 0 or factor > 1, "0 (never) or a number above 1, such as 10")
    for path, known in (
        ("objective", OBJECTIVES),
        ("optimizer.name", OPTIMIZERS),
        ("optimizer.schedule", SCHEDULES),
        ("time.distribution", TIME_DISTRIBUTIONS),
        ("data.normalization", NORMALIZATIONS),
    ):
        _expect_name(config, path, known)
    ends = config.optimizer.schedule == "constant" or config.optimizer.decay_steps >= 1
    wanted = f"1 or more: the number of steps that the {config.optimizer.schedule} schedule takes after the warm-up"
    expect(config, "optimizer.decay_steps", ends, wanted)
    for path in ("flow_map.start_times", "flow_map.end_times"):
        values = _get(config, path)
        holds = len(values) == 2 and all(isinstance(value, int | float) for value in values) and values[1] > 0
        expect(config, path, holds, "mean and std of a logit, such as (0.4, 1.0)")
    check_eval(config.eval)
    if bool(config.mask_ratio) != bool(config.model.decoder_depth):
        raise ConfigError(
            f"config.mask_ratio={config.mask_ratio} with config.model.decoder_depth={config.model.decoder_depth}: "
            "set both for masked training, such as 0.75 and 2 (one level only: patch_sizes=(2,)), or leave both at 0."
        )
    if config.objective == "flow_map":
        _check_flow_map(config)
    elif config.model.guidance_max > 1:
        expect(config, "model.guidance_max", False, "1: only objective='flow_map' has the scale as an input")
    if config.trunk_drop and (len(config.model.depths) == 1 or not config.model.skip):
        expect(config, "trunk_drop", False, "0, or a model of two levels or more with model.skip=True")
    expect(config, "model.convention", config.model.convention in (None, "velocity"), "velocity: what is trained here")


def _check_flow_map(config: ConfigDict) -> None:
    expect(config, "flow_map.p", 0 <= config.flow_map.p <= 2, "0 to 2")
    expect(config, "flow_map.guidance", 0 <= config.flow_map.guidance < 1, "at least 0 and below 1 (0.6 acts as 2.5)")
    if not config.label_dropout:
        expect(config, "flow_map.guidance", not config.flow_map.guidance, "0 without label_dropout: no null class")
        expect(config, "model.guidance_max", config.model.guidance_max == 1, "1 without label_dropout: no null class")
    expect(config, "flow_map.guidance_until", 0 <= config.flow_map.guidance_until <= 1, "a time from 0 to 1")
    pairs = config.batch_size // config.gradient_accumulation
    expect(config, "batch_size", pairs % 2 == 0, "an even number of examples in each part: a flow map trains on pairs")
    expect(config, "model.attention", config.model.attention != "cudnn", "'xla': cuDNN's has no forward derivative")
    for path in ("mask_ratio", "trunk_drop"):
        expect(config, path, not _get(config, path), "0 with objective='flow_map'")
    if config.model.guidance_max > 1:
        expect(config, "flow_map.guidance", not config.flow_map.guidance, "0 with model.guidance_max: give one of them")
        largest = config.model.guidance_max
        for path in ("sample.guidance_scale", "eval.guidance_scales"):
            fit = all(1 <= scale <= largest for scale in np.atleast_1d(_get(config, path)))
            expect(config, path, fit, f"scales from 1 to model.guidance_max={largest:g}")
    if sum(config.model.depths) < 2:
        raise ConfigError("config.model.depths: a flow map needs two blocks, one for the time t and one for r.")


def expect(config: ConfigDict, path: str, holds: bool, expected: str) -> None:
    """Raise ConfigError, with the value at `path` and what was expected, unless it holds."""
    if not holds:
        raise ConfigError(f"config.{path}={_get(config, path)!r}: expected {expected}.")


def _expect_name(config: ConfigDict, path: str, known: Collection[str]) -> None:
    name = _get(config, path)
    if name not in known:
        raise ConfigError(f"config.{path}={name!r}{suggest(name, known)}: expected one of {', '.join(known)}.")


def _get(config: ConfigDict, path: str) -> Any:
    for part in path.split("."):
        config = config[part]
    return config


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return every value of a tree of dicts by its path, such as "optimizer.learning_rate"."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
