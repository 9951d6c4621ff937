"""The published PyTorch state dict: name, shape and layout of every entry, and our parameter that it corresponds to."""

import dataclasses
import re
from collections.abc import Iterable, Iterator

import numpy as np

from mpdit_jax.errors import ConfigError
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.embeddings import TIME_FEATURES, sincos_positions


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of a weight: a `torch_shape` array, transposed by `axes` and reshaped, is a `jax_shape` array."""

    torch_shape: tuple[int, ...]
    axes: tuple[int, ...]
    jax_shape: tuple[int, ...]

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """Convert an array from PyTorch's layout to ours."""
        return np.ascontiguousarray(array.transpose(self.axes).reshape(self.jax_shape))

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Convert an array from our layout to PyTorch's."""
        transposed = [self.torch_shape[axis] for axis in self.axes]
        return np.ascontiguousarray(array.reshape(transposed).transpose(np.argsort(self.axes)))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A PyTorch tensor and the parameter that it corresponds to."""

    name: str
    path: str
    layout: Layout
    layer: int | None = None  # index in a stacked parameter


def _unchanged(*shape: int) -> Layout:
    return Layout(shape, tuple(range(len(shape))), shape)


def _linear(inputs: int, outputs: int) -> Layout:
    return Layout((outputs, inputs), (1, 0), (inputs, outputs))


def _pointwise(width: int) -> Layout:
    return Layout((width, width, 1), (2, 1, 0), (width, width))


def _patch(patch: int, channels: int, width: int) -> Layout:
    return Layout((width, channels, patch, patch), (2, 3, 1, 0), (patch * patch * channels, width))


def _pair(name: str, path: str, weight: Layout, layer: int | None = None) -> Iterator[Entry]:
    """Yield the entries of a weight and its bias."""
    yield Entry(f"{name}.weight", f"{path}.kernel", weight, layer)
    yield Entry(f"{name}.bias", f"{path}.bias", _unchanged(weight.torch_shape[0]), layer)


@dataclasses.dataclass(frozen=True)
class LevelNames:
    """Published names of the parts of one level; "" for a part that the level does not have."""

    positions: str
    patches: str
    skip: str
    upsampler: str
    blocks: str


CLASS_TABLE = "y_embedder.embedding_table.weight"
DIT_NAMES = LevelNames("pos_embed", "x_embedder", "", "", "blocks")


def level_names(levels: int) -> list[LevelNames]:
    """Return the published names of each level, coarse to fine, of an MPDiT with that many levels."""
    first = LevelNames("pos_embed", "x_embedder", "", "", "downsample_blocks")
    if levels == 2:
        first = dataclasses.replace(first, positions="pos_embed_downsampled")
        return [first, LevelNames("pos_embed", "x_embedder_skip", "linear_skip", "upsampler", "upsample_blocks")]
    kinds = ("pos_embed", "x_embedder", "linear_skip", "upsampler", "upsample_blocks")
    return [first, *(LevelNames(*(f"{kind}_lvl{level}" for kind in kinds)) for level in range(1, levels))]


def trained_entries(config: ModelConfig) -> Iterator[Entry]:
    """Yield the entry of every trained tensor. Raise ConfigError if the config has no published names."""
    for name, published in (
        ("upsampler", "linear_linear"),
        ("fno_init", "paper"),
        ("sinusoidal_layers", 2),
        ("decoder_depth", 0),
        ("guidance_max", 1),
    ):
        value = getattr(config, name)
        if value != published:
            raise ConfigError(f"model.{name}={value!r} has no published PyTorch names: only {published!r} has them.")
    if (config.modulation, config.condition) == ("shared", "tokens"):
        return _mpdit_entries(config)
    dit = (config.modulation, config.condition, config.time_embedding) == ("per_block", "vector", "sinusoidal")
    if dit and len(config.depths) == 1:
        return _dit_entries(config)
    raise ConfigError(
        f"model.modulation={config.modulation!r}, model.condition={config.condition!r}, {len(config.depths)} level(s), "
        f"model.time_embedding={config.time_embedding!r} has no published PyTorch names: only MPDiT (shared, "
        "tokens) and DiT (per_block, vector, one level, sinusoidal) have them."
    )


# Entries of every DiT and MPDiT, which show the prefix that a wrapping module puts in front of its network's names.
EVERY_MODEL = re.compile(r"(?:(.+)\.)?(?:x_embedder\.proj|final_layer\.linear)\.weight")


def is_dit(names: Iterable[str]) -> bool:
    """Return whether these are the names of a DiT."""
    return any(name.startswith("blocks.") for name in names)


def is_mpdit(names: Iterable[str]) -> bool:
    """Return whether these are the names of an MPDiT."""
    return any(name.startswith("downsample_blocks.") for name in names)


def _mpdit_entries(config: ModelConfig) -> Iterator[Entry]:
    width, channels = config.hidden_size, config.in_channels
    for level, names in enumerate(level_names(len(config.depths))):
        path, patch = f"levels.{level}", config.patch_sizes[level]
        if level == 0 or config.skip:
            yield from _pair(f"{names.patches}.proj", f"{path}.patch_embed", _patch(patch, channels, width))
        if level > 0 and config.skip:
            yield from _pair(names.skip, f"{path}.skip", _linear(width, width))
        if level > 0:
            expanded = width * (config.patch_sizes[level - 1] // patch) ** 2
            yield from _pair(f"{names.upsampler}.proj", f"{path}.upsample.expand.linear", _linear(width, expanded))
            yield from _pair(f"{names.upsampler}.refine", f"{path}.upsample.refine.linear", _linear(width, width))
        for layer in range(config.depths[level]):
            yield from _block_entries(f"{names.blocks}.{layer}", level, layer, config)
    yield from _time_entries(config)
    yield _class_table(config, config.class_tokens * width)
    yield from _pair("time_modulation.1", "time_modulation.linear", _linear(width, 6 * width))
    yield from _pair("final_layer.linear", "final", _linear(width, config.patch_sizes[-1] ** 2 * channels))


def _dit_entries(config: ModelConfig) -> Iterator[Entry]:
    width, channels, patch = config.hidden_size, config.in_channels, config.patch_sizes[0]
    yield from _pair("x_embedder.proj", "levels.0.patch_embed", _patch(patch, channels, width))
    yield from _time_entries(config)
    yield _class_table(config, width)
    for layer in range(config.depths[0]):
        yield from _block_entries(f"blocks.{layer}", 0, layer, config)
        name = f"blocks.{layer}.adaLN_modulation.1"
        yield from _pair(name, "levels.0.blocks.layers.modulation.linear", _linear(width, 6 * width), layer)
    yield from _pair("final_layer.adaLN_modulation.1", "final_modulation.linear", _linear(width, 2 * width))
    yield from _pair("final_layer.linear", "final", _linear(width, patch**2 * channels))


def _block_entries(name: str, level: int, layer: int, config: ModelConfig) -> Iterator[Entry]:
    width, mlp, path = config.hidden_size, config.mlp_size, f"levels.{level}.blocks.layers"
    yield from _pair(f"{name}.attn.qkv", f"{path}.attention.qkv", _linear(width, 3 * width), layer)
    yield from _pair(f"{name}.attn.proj", f"{path}.attention.out", _linear(width, width), layer)
    yield from _pair(f"{name}.mlp.fc1", f"{path}.mlp.inner", _linear(width, mlp), layer)
    yield from _pair(f"{name}.mlp.fc2", f"{path}.mlp.outer", _linear(mlp, width), layer)


def _class_table(config: ModelConfig, width: int) -> Entry:
    return Entry(CLASS_TABLE, "class_embedding.table", _unchanged(config.num_classes + config.null_class, width))


def _time_entries(config: ModelConfig) -> Iterator[Entry]:
    width = config.hidden_size
    if config.time_embedding == "sinusoidal":
        yield from _pair("t_embedder.mlp.0", "time_embedding.layers.0", _linear(TIME_FEATURES, width))
        yield from _pair("t_embedder.mlp.2", "time_embedding.layers.1", _linear(width, width))
        return
    fno = config.fno_width
    spectral = _unchanged(fno, fno, config.fno_modes)
    yield from _pair("t_embedder.fc0", "time_embedding.lift", _linear(1, fno))
    for layer in range(config.fno_layers):
        path = f"time_embedding.layers.{layer}"
        yield Entry(f"t_embedder.conv{layer}.weights_real", f"{path}.spectral.real", spectral)
        yield Entry(f"t_embedder.conv{layer}.weights_imag", f"{path}.spectral.imaginary", spectral)
        yield from _pair(f"t_embedder.w{layer}", f"{path}.pointwise", _pointwise(fno))
    yield from _pair("t_embedder.fc1", "time_embedding.project", _linear(fno, width))


def position_tables(config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and array (1, N, D) of every position table, which the published state dict stores."""
    for level, names in enumerate(level_names(len(config.depths))):
        yield names.positions, sincos_positions(config.grid(level), config.hidden_size)[None]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every entry of the config's published state dict, by name."""
    trained = {entry.name: entry.layout.torch_shape for entry in trained_entries(config)}
    return trained | {name: table.shape for name, table in position_tables(config)}
