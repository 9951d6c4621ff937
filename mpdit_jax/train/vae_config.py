"""The base config of a VAE's training, and its checks."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.config.base import to_json
from mpdit_jax.config.checks import check_fields, leaves
from mpdit_jax.errors import CheckpointError, ConfigError
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.vae.config import AutoencoderConfig
from mpdit_jax.validation import LARGEST_SIDE


def base_vae_config() -> ConfigDict:
    """Every field there is. A file in `configs/` starts from this."""
    config = ConfigDict()
    config.seed = 0  # initialization, data order, samples of the posteriors
    config.batch_size = 64
    config.steps = 1_000
    config.learning_rate = 1e-3  # of Adam, decayed to 0 by a cosine
    config.kl_weight = 1e-3  # of the KL divergence a latent value, beside the mean absolute error of a pixel

    config.data = ConfigDict()
    config.data.images = "idx:/usr/share/datasets/fashion-mnist"  # as --images of prepare
    config.data.split = "train"
    config.data.image_size = 32

    config.model = ConfigDict()
    config.model.in_channels = 1  # 1 for grey, 3 for RGB
    config.model.block_out_channels = (16, 32, 32)  # one a resolution, each half of the one before
    config.model.layers_per_block = 1
    config.model.latent_channels = 4
    config.model.norm_num_groups = 8

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 250  # steps
    config.checkpoint.grace = 600.0  # seconds after SIGTERM in which all must be saved; 0 for no limit
    config.log = ConfigDict({"every": 50})  # steps
    return config.lock()


def resolve_vae(config: ConfigDict | FrozenConfigDict) -> FrozenConfigDict:
    """A checked copy.

    Raises:
        ConfigError: a field that cannot be.
    """
    check_fields(config, base_vae_config(), "config")
    resolved = ConfigDict(config.to_dict())
    values = {"seed": resolved.seed, "kl_weight": resolved.kl_weight, "checkpoint.grace": resolved.checkpoint.grace}
    for path, value in values.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"config.{path}={value}: expected 0 or more.")
    if not 1 <= resolved.data.image_size <= LARGEST_SIDE:
        raise ConfigError(f"config.data.image_size={resolved.data.image_size}: expected 1 to {LARGEST_SIDE} pixels.")
    for path in ("batch_size", "steps", "checkpoint.every", "log.every"):
        group, _, name = path.rpartition(".")
        value = (resolved[group] if group else resolved)[name]
        if value < 1:
            raise ConfigError(f"config.{path}={value}: expected 1 or more.")
    if not 0 < resolved.learning_rate < math.inf:
        raise ConfigError(f"config.learning_rate={resolved.learning_rate}: expected a positive number.")
    if resolved.model.in_channels not in (1, 3):
        raise ConfigError(f"config.model.in_channels={resolved.model.in_channels}: expected 1 (grey) or 3 (RGB).")
    factor = autoencoder_config(resolved).downsample_factor
    if resolved.data.image_size % factor:
        raise ConfigError(
            f"config.data.image_size={resolved.data.image_size}: expected a multiple of {factor}, the factor "
            f"of {len(resolved.model.block_out_channels)} resolutions."
        )
    return FrozenConfigDict(resolved)


def autoencoder_config(config: ConfigDict | FrozenConfigDict) -> AutoencoderConfig:
    """The architecture."""
    fields = config.model.to_dict()
    return AutoencoderConfig(**fields, out_channels=fields["in_channels"])


def compare_vae_configs(workdir: Path, config: FrozenConfigDict) -> Mapping[str, tuple[Any, Any]]:
    """The fields in which a config contradicts the one stored in a VAE's workdir: all but `checkpoint.grace`.

    Raises:
        CheckpointError: the stored one cannot be read.
    """
    path = workdir / "config.json"
    try:
        before = dict(leaves(parse_json(path.read_text())))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): use another --workdir.") from error
    now = dict(leaves(json.loads(to_json(config))))
    names = sorted({*before, *now} - {"checkpoint.grace"})
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
