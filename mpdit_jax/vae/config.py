"""The architecture of an AutoencoderKL, as diffusers' `config.json` describes it."""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpdit_jax.errors import ConfigError, WeightsWarning
from mpdit_jax.io.json_files import parse_json

_NAMES = {"_class_name": ("AutoencoderKL",), "act_fn": ("silu", "swish")}
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# Keys that describe a file or how a library runs the network, and change no result.
_DESCRIPTIVE = (
    "architectures", "auto_map", "dtype", "gradient_checkpointing", "library_name", "license", "model_type",
    "tile_latent_min_size", "tile_overlap_factor", "tile_sample_min_size", "torch_dtype", "transformers_version",
    "use_slicing", "use_tiling", "variant",
)  # fmt: skip
_MAX_CHANNELS, _MAX_LAYERS = 2**16, 32  # limits far above any real network


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of an AutoencoderKL, with the names and defaults of diffusers' `config.json`.

    An impossible value raises ConfigError. Fields marked "metadata" do not affect the computation.

    Attributes:
        in_channels, out_channels: channels of the encoder's and of the decoder's images.
        block_out_channels: width of each resolution, finest first; each resolution is half the previous one.
        layers_per_block: residual blocks per resolution of the encoder; the decoder has one more.
        latent_channels: channels of the latents.
        norm_num_groups: groups of every group norm.
        scaling_factor, shift_factor: metadata; `(latents - shift_factor) * scaling_factor` has approximately unit
            variance. A shift_factor of None is 0.
        latents_mean, latents_std: metadata; of the latents channel by channel, in some checkpoints.
        use_quant_conv, use_post_quant_conv: whether 1x1 convolutions follow the encoder and precede the decoder.
        mid_block_add_attention: whether encoder and decoder have attention at the lowest resolution.
        sample_size: metadata; image size in training.
        force_upcast: metadata; whether the checkpoint overflows in float16.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int | tuple[int, ...] = 32
    force_upcast: bool = True

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "latent_channels", "norm_num_groups"):
            self._expect(name, _is_at_most(_MAX_CHANNELS), f"a whole number from 1 to {_MAX_CHANNELS}")
        self._expect("layers_per_block", _is_at_most(_MAX_LAYERS), f"a whole number from 1 to {_MAX_LAYERS}")
        self._expect(
            "block_out_channels",
            lambda value: _all(_is_at_most(_MAX_CHANNELS))(value) and len(value) <= _MAX_LAYERS,
            f"{_MAX_LAYERS} whole numbers at most, from 1 to {_MAX_CHANNELS}",
        )
        self._expect("scaling_factor", lambda value: _is_finite(value) and value > 0, "a positive number")
        self._expect("shift_factor", lambda value: value is None or _is_finite(value), "a finite number, or null")
        for name in ("latents_mean", "latents_std"):
            self._expect(name, lambda value: value is None or _all(_is_finite)(value), "finite numbers, or null")
        self._expect(
            "sample_size", lambda value: _is_positive(value) or _all(_is_positive)(value), "whole numbers of 1 or more"
        )
        for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "force_upcast"):
            self._expect(name, lambda value: isinstance(value, bool), "true or false")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ConfigError(
                    f"VAE config: block_out_channels has {width}, which norm_num_groups={self.norm_num_groups} does "
                    "not divide; make every width a multiple of it."
                )

    def _expect(self, name: str, is_valid: Callable[[Any], bool], expected: str) -> None:
        value = vars(self)[name]
        if not is_valid(value):
            raise ConfigError(f"VAE config: {name} is {value!r}; expected {expected}.")

    @property
    def downsample_factor(self) -> int:
        """Image pixels per latent pixel, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)


def _is_at_most(limit: int) -> Callable[[Any], bool]:
    return lambda value: _is_positive(value) and value <= limit


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: Any) -> bool:
    # A comparison, because math.isfinite fails on an integer that is larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _all(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return the check that a value is a non-empty sequence of valid items."""
    return lambda value: isinstance(value, tuple | list) and bool(value) and all(map(is_valid, value))


def config_from_diffusers(entries: Mapping[str, Any]) -> AutoencoderConfig:
    """Convert the entries of a diffusers `config.json`. Missing keys have diffusers' defaults.

    Unknown keys that are null, begin with "_" or are known to change no result are ignored; a WeightsWarning names the
    last kind.

    Raises:
        ConfigError: another model class, an unsupported block type, activation or key (the message names all of them),
            or an impossible value.
    """
    fields = {field.name: field for field in dataclasses.fields(AutoencoderConfig)}
    refused = []
    values: dict[str, Any] = {}
    for key, value in entries.items():
        if key in fields:
            if value is None and fields[key].default is not None:
                refused.append(f"{key}=null (expected a value such as {fields[key].default!r})")
            else:
                values[key] = tuple(value) if isinstance(value, list) else value
        elif key in _NAMES:
            if value not in _NAMES[key]:
                refused.append(f"{key}={value!r} (expected {_NAMES[key][0]!r})")
        elif key in _BLOCKS:
            if not isinstance(value, list | tuple) or any(block != _BLOCKS[key] for block in value):
                refused.append(f"{key}={value!r} (expected only {_BLOCKS[key]!r})")
        elif key in _DESCRIPTIVE:
            text = f"VAE config: {key}={value!r} is ignored: it changes no result."
            warnings.warn(text, WeightsWarning, stacklevel=2)
        elif not key.startswith("_") and value is not None:
            refused.append(f"{key}={value!r} (unknown key; delete it from config.json if the network is without it)")
    widths = values.get("block_out_channels", AutoencoderConfig.block_out_channels)
    if not refused and isinstance(widths, tuple):
        for key in _BLOCKS:
            count = len(entries.get(key, widths))
            if count != len(widths):
                refused.append(f"{key} of length {count} (expected one for each of block_out_channels={widths})")
    if refused:
        raise ConfigError(
            f"VAE config: {'; '.join(refused)} not supported; use a Stable-Diffusion-style AutoencoderKL checkpoint."
        )
    return AutoencoderConfig(**values)


def config_to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    """Return the entries of the `config.json` from which diffusers builds the same architecture."""
    depth = len(config.block_out_channels)
    return {
        **{key: names[0] for key, names in _NAMES.items()},
        **{key: [block] * depth for key, block in _BLOCKS.items()},
        **dataclasses.asdict(config),
    }


def read_config(path: Path) -> AutoencoderConfig:
    """Read a diffusers `config.json`. Raise ConfigError if it is not JSON or `config_from_diffusers` refuses it."""
    try:
        entries = parse_json(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); copy the VAE's config.json again.") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"{path} holds a {type(entries).__name__}; expected the JSON object diffusers writes.")
    return config_from_diffusers(entries)
