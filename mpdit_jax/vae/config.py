"""The architecture of an AutoencoderKL, as diffusers' `config.json` describes it."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpdit_jax.errors import ConfigError
from mpdit_jax.io.json_files import parse_json

_DOWN_BLOCK = "DownEncoderBlock2D"
_UP_BLOCK = "UpDecoderBlock2D"
_ACTIVATIONS = ("silu", "swish")
_MOST_CHANNELS, _MOST_LAYERS = 2**16, 32


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """What an AutoencoderKL is made of; names and defaults are those of diffusers' `config.json`.

    Raises ConfigError for an impossible value, naming the field.

    Attributes:
        in_channels: channels of the images the encoder reads.
        out_channels: channels of the images the decoder writes.
        block_out_channels: width of each resolution, finest first; every step but the last halves the resolution.
        layers_per_block: residual blocks per resolution of the encoder (the decoder has one more).
        latent_channels: channels of the latents.
        norm_num_groups: groups of every group norm.
        scaling_factor: `(latents - shift_factor) * scaling_factor` has about unit variance. Metadata: `encode` and
            `decode` work on unscaled latents.
        shift_factor: see `scaling_factor`; None means 0.
        latents_mean: per-channel mean that some checkpoints give beside `shift_factor`. Metadata.
        latents_std: per-channel standard deviation that comes with `latents_mean`. Metadata.
        use_quant_conv: a 1x1 convolution after the encoder.
        use_post_quant_conv: a 1x1 convolution before the decoder.
        mid_block_add_attention: attention at the lowest resolution of encoder and decoder.
        sample_size: image size the VAE was trained at. Metadata.
        force_upcast: whether the checkpoint overflows in float16. Metadata: we compute in float32 or bfloat16.
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
        # Far beyond any such network, and little enough to be compared with the weights in no time.
        for name in ("in_channels", "out_channels", "latent_channels", "norm_num_groups"):
            self._expect(name, _is_at_most(_MOST_CHANNELS), f"a whole number from 1 to {_MOST_CHANNELS}")
        self._expect("layers_per_block", _is_at_most(_MOST_LAYERS), f"a whole number from 1 to {_MOST_LAYERS}")
        self._expect(
            "block_out_channels",
            lambda value: _all(_is_at_most(_MOST_CHANNELS))(value) and len(value) <= _MOST_LAYERS,
            f"{_MOST_LAYERS} whole numbers at most, from 1 to {_MOST_CHANNELS}",
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

    def _expect(self, name: str, holds: Callable[[Any], bool], expected: str) -> None:
        value = vars(self)[name]
        if not holds(value):
            raise ConfigError(f"VAE config: {name} is {value!r}; expected {expected}.")

    @property
    def downsample_factor(self) -> int:
        """Image pixels per latent pixel, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)


def _is_at_most(most: int) -> Callable[[Any], bool]:
    return lambda value: _is_positive(value) and value <= most


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: Any) -> bool:
    # Compared, since a whole number may be larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _all(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a sequence, not empty, and all of it passes."""
    return lambda value: isinstance(value, tuple | list) and bool(value) and all(map(holds, value))


def config_from_diffusers(entries: Mapping[str, Any]) -> AutoencoderConfig:
    """Reads the entries of a diffusers `config.json`.

    Args:
        entries: the parsed JSON object. Missing keys take diffusers' defaults; keys starting with `_` are its own
            bookkeeping, of which only `_class_name` is looked at.

    Raises:
        ConfigError: another class of model, a block type, activation or key that is not supported (all of them
            named), or an impossible value.
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
        elif key == "_class_name":
            if value != "AutoencoderKL":
                refused.append(f"_class_name={value!r} (expected 'AutoencoderKL')")
        elif key == "act_fn":
            if value not in _ACTIVATIONS:
                refused.append(f"act_fn={value!r} (expected 'silu')")
        elif key in ("down_block_types", "up_block_types"):
            expected = _DOWN_BLOCK if key == "down_block_types" else _UP_BLOCK
            if not isinstance(value, list | tuple) or any(block != expected for block in value):
                refused.append(f"{key}={value!r} (expected only {expected!r})")
        elif not key.startswith("_") and value is not None:
            refused.append(f"{key}={value!r} (unknown key)")
    # A single width is diffusers' default and a single block type too, so their lengths are compared as given.
    for key in ("down_block_types", "up_block_types"):
        blocks = entries.get(key)
        widths = values.get("block_out_channels", AutoencoderConfig.block_out_channels)
        if blocks is None or refused or not isinstance(widths, tuple):
            continue
        if len(blocks) != len(widths):
            refused.append(f"{key} of length {len(blocks)} (expected one for each of block_out_channels={widths})")
    if refused:
        raise ConfigError(
            f"VAE config: {'; '.join(refused)} not supported; use a Stable-Diffusion-style AutoencoderKL checkpoint."
        )
    return AutoencoderConfig(**values)


def config_to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    """Gives the entries of the `config.json` from which diffusers builds the same architecture."""
    depth = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": [_DOWN_BLOCK] * depth,
        "up_block_types": [_UP_BLOCK] * depth,
        **dataclasses.asdict(config),
    }


def read_config(path: Path) -> AutoencoderConfig:
    """Reads a diffusers `config.json` file; raises ConfigError (see `config_from_diffusers`) or for a file not JSON."""
    try:
        entries = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); copy the VAE's config.json again.") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"{path} holds a {type(entries).__name__}; expected the JSON object diffusers writes.")
    return config_from_diffusers(entries)
