"""Named presets, and functions that create a model from one."""

from typing import Any

import jax
from flax import nnx

from mpdit_jax.errors import ConfigError
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.validation import is_whole, suggest

_SMALL = {"hidden_size": 384, "num_heads": 6}
_BASE = {"hidden_size": 768, "num_heads": 12}
_LARGE = {"hidden_size": 1024, "num_heads": 16}
_XLARGE = {"hidden_size": 1152, "num_heads": 16}

PRESETS: dict[str, dict[str, Any]] = {
    "mpdit_b": {"patch_sizes": (4, 2), "depths": (6, 6), **_BASE},
    "mpdit_l": {"patch_sizes": (4, 2), "depths": (18, 6), **_LARGE},
    "mpdit_xl": {"patch_sizes": (4, 2), "depths": (22, 6), **_XLARGE},
    "mpdit3_b": {"patch_sizes": (8, 4, 2), "depths": (6, 4, 2), "input_size": (64, 64), **_BASE},
    "mpdit3_l": {"patch_sizes": (8, 4, 2), "depths": (14, 6, 4), "input_size": (64, 64), **_LARGE},
    "mpdit3_xl": {"patch_sizes": (8, 4, 2), "depths": (14, 8, 6), "input_size": (64, 64), **_XLARGE},
    "mpdit3_xl_paper": {"patch_sizes": (8, 4, 2), "depths": (18, 6, 4), "input_size": (64, 64), **_XLARGE},
}

# The isotropic baselines: dit_b_2 is DiT-B with patch size 2.
_DIT = {"time_embedding": "sinusoidal", "condition": "vector", "modulation": "per_block"}
for _name, _depth, _size in (("s", 12, _SMALL), ("b", 12, _BASE), ("l", 24, _LARGE), ("xl", 28, _XLARGE)):
    for _patch in (2, 4, 8):
        PRESETS[f"dit_{_name}_{_patch}"] = {"patch_sizes": (_patch,), "depths": (_depth,), **_DIT, **_size}


def presets() -> tuple[str, ...]:
    """Return the names that `create_model` and `config.model.preset` accept."""
    return tuple(PRESETS)


def preset_config(preset: str, **overrides: Any) -> ModelConfig:
    """Return the preset's ModelConfig with some fields replaced.

    Raises:
        ConfigError: unknown preset, unknown field, or an impossible value.
    """
    if preset not in PRESETS:
        raise ConfigError(
            f"unknown preset {preset!r}{suggest(str(preset), PRESETS)}: expected one of {', '.join(PRESETS)}."
        )
    return ModelConfig().replace(**{**PRESETS[preset], **overrides})


def create_model(preset: str = "mpdit_b", *, seed: int = 0, **overrides: Any) -> MPDiT:
    """Create a model with randomly initialized parameters.

    Args:
        preset: a name from `presets()`.
        seed: seed of the initialization, from 0 to 2**32 - 1.
        **overrides: any field of `ModelConfig`, such as input_size, in_channels, num_classes, depths, dtype.

    Raises:
        ConfigError: unknown preset, unknown field, or an impossible value.
    """
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r}: expected a whole number from 0 to 2**32 - 1.")
    return build_model(preset_config(preset, **overrides), jax.random.key(seed))


def build_model(config: ModelConfig, key: jax.Array) -> MPDiT:
    """Create a randomly initialized model of `config`; may be called under `jit` and `eval_shape`."""
    return MPDiT(config, nnx.Rngs(params=key))
