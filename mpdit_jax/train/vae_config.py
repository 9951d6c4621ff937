"""The base config of a VAE's training, and its validation."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from mpdit_jax.config.base import to_json
from mpdit_jax.config.checks import check_fields, expect, leaves
from mpdit_jax.errors import CheckpointError, ConfigError
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.vae.config import AutoencoderConfig
from mpdit_jax.validation import LARGEST_SIDE

_CONTINUABLE = ("checkpoint.", "log.", "profile.")  # groups that may change; 0.1.0 stored some of their fields only


def base_vae_config() -> ConfigDict:
    """Return every field there is. A file in `configs/` starts from this."""
    config = ConfigDict()
    config.seed = 0  # initialization, data order, samples of the posteriors
    config.batch_size = 64
    config.steps = 1_000
    config.learning_rate = 1e-3  # of Adam, decayed to 0 by a cosine
    config.kl_weight = 1e-3  # weight of the KL per latent value; the other loss is the mean absolute error per pixel

    config.data = ConfigDict()
    config.data.images = "idx:/usr/share/datasets/fashion-mnist"  # as --images of prepare
    config.data.split = "train"
    config.data.image_size = 32

    config.model = ConfigDict()
    config.model.in_channels = 1  # 1 for grey, 3 for RGB
    config.model.block_out_channels = (16, 32, 32)  # channels at each resolution, each of half the previous side
    config.model.layers_per_block = 1
    config.model.latent_channels = 4
    config.model.norm_num_groups = 8

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 250  # steps
    config.checkpoint.keep = 2  # newest checkpoints kept
    config.checkpoint.keep_every = 0  # steps; checkpoints at multiples of this are never deleted; 0 for none
    config.checkpoint.grace = 600.0  # seconds after SIGTERM in which all must be saved; 0 for no limit
    config.log = ConfigDict({"every": 50, "wandb_project": ""})  # steps; also to a project of Weights & Biases
    config.profile = ConfigDict({"start": 10, "steps": 0})  # steps recorded for TensorBoard's profile page; 0 for none
    return config.lock()


def resolve_vae(config: ConfigDict | FrozenConfigDict) -> FrozenConfigDict:
    """Return a checked copy.

    Raises:
        ConfigError: an unknown field or an impossible value.
    """
    check_fields(config, base_vae_config(), "config")
    resolved = ConfigDict(config.to_dict())
    values = dict(leaves(resolved.to_dict()))
    for path in ("batch_size", "steps", "checkpoint.every", "checkpoint.keep", "log.every"):
        expect(resolved, path, values[path] >= 1, "1 or more")
    for path in ("seed", "kl_weight", "checkpoint.grace", "checkpoint.keep_every", "profile.start", "profile.steps"):
        expect(resolved, path, 0 <= values[path] < math.inf, "0 or more")
    expect(resolved, "data.image_size", 1 <= resolved.data.image_size <= LARGEST_SIDE, f"1 to {LARGEST_SIDE} pixels")
    expect(resolved, "learning_rate", 0 < resolved.learning_rate < math.inf, "a positive number")
    expect(resolved, "model.in_channels", resolved.model.in_channels in (1, 3), "1 (grey) or 3 (RGB)")
    factor = autoencoder_config(resolved).downsample_factor
    if resolved.data.image_size % factor:
        raise ConfigError(
            f"config.data.image_size={resolved.data.image_size}: expected a multiple of {factor}, the factor "
            f"of {len(resolved.model.block_out_channels)} resolutions."
        )
    return FrozenConfigDict(resolved)


def autoencoder_config(config: ConfigDict | FrozenConfigDict) -> AutoencoderConfig:
    """Return the architecture."""
    fields = config.model.to_dict()
    return AutoencoderConfig(**fields, out_channels=fields["in_channels"])


def compare_vae_configs(workdir: Path, config: FrozenConfigDict) -> Mapping[str, tuple[Any, Any]]:
    """Return the fields that differ from the stored config, except those that change no result.

    Raises:
        CheckpointError: the stored one cannot be read.
    """
    path = workdir / "config.json"
    try:
        before = dict(leaves(parse_json(path.read_text())))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): use another --workdir.") from error
    now = dict(leaves(json.loads(to_json(config))))
    names = [
        name for name in sorted({*before, *now}) if not name.startswith(_CONTINUABLE) or name == "checkpoint.every"
    ]
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
