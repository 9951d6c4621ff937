"""Published PyTorch names and layouts ⇄ our model, from one table in both directions."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import ConfigError, WeightsError
from mpdit_jax.interop.files import normalize_state_dict, read_state_dict
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.embeddings import sincos_positions
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import Parameters, abstract, merge, split
from mpdit_jax.model.presets import PRESETS, model_config

StateDict = dict[str, np.ndarray]
# Tables are compared and recomputed, not kept. In float32 they differ by what float64 sin and cos round to; who saved
# them in bfloat16 rounded everything else in the file as well.
TABLE_ATOL = 1e-5
HALF_PRECISION_ATOL = 1e-2


def load_torch(source: str | Path | Mapping[str, Any], num_heads: int | None = None) -> MPDiT:
    """A model with published PyTorch weights.

    Args:
        source: path of a `.safetensors`, `.pt` or `.pth` (weights only; the key "ema" is preferred), or a mapping from
            the published names to arrays.
        num_heads: attention heads, which no shape tells; default: those of the preset with this width.

    Raises:
        WeightsError: the file cannot be read, or entries are missing, extra or misshapen; all of them are named.
        MissingExtraError: a PyTorch file without PyTorch installed.
    """
    if isinstance(source, Mapping):
        state, origin = normalize_state_dict(source, "state dict"), "state dict"
    else:
        state, origin = read_state_dict(source), str(source)
    config = infer_config(state, num_heads, origin)
    _check_entries(state, config, origin)
    structure, shapes = abstract(config)
    parameters: Parameters = {}
    layers: dict[str, list[np.ndarray]] = {}
    for entry in _entries(config):
        array = entry.layout.to_jax(state[entry.name])
        if entry.layer is None:
            parameters[entry.path] = jnp.asarray(array)
        else:
            layers.setdefault(entry.path, []).append(array)
    parameters.update({path: jnp.asarray(np.stack(arrays)) for path, arrays in layers.items()})
    return merge(structure, {path: parameters[path] for path in shapes})


def to_torch(model: MPDiT) -> StateDict:
    """The model's weights under their published PyTorch names, float32 numpy; the exact inverse of `load_torch`."""
    parameters = {path: np.asarray(array) for path, array in split(model)[1].items()}
    state: StateDict = dict(_positions(model.config))
    for entry in _entries(model.config):
        array = parameters[entry.path]
        state[entry.name] = entry.layout.to_torch(array if entry.layer is None else array[entry.layer])
    return state


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one kind of weight is laid out: `torch_shape` on their side, transposed by `axes`, `jax_shape` on ours."""

    torch_shape: tuple[int, ...]
    axes: tuple[int, ...]
    jax_shape: tuple[int, ...]

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """Their layout to ours."""
        return np.ascontiguousarray(array.transpose(self.axes).reshape(self.jax_shape))

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Our layout to theirs."""
        transposed = [self.torch_shape[axis] for axis in self.axes]
        return np.ascontiguousarray(array.reshape(transposed).transpose(np.argsort(self.axes)))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One PyTorch tensor and the parameter (or the layer of a stacked parameter) it becomes."""

    name: str
    path: str
    layout: Layout
    layer: int | None = None


def _vector(size: int) -> Layout:
    return Layout((size,), (0,), (size,))


def _kept(*shape: int) -> Layout:
    return Layout(shape, tuple(range(len(shape))), shape)


def _linear(inputs: int, outputs: int) -> Layout:
    return Layout((outputs, inputs), (1, 0), (inputs, outputs))


def _pointwise(width: int) -> Layout:
    return Layout((width, width, 1), (2, 1, 0), (width, width))


def _patch(patch: int, channels: int, width: int) -> Layout:
    return Layout((width, channels, patch, patch), (2, 3, 1, 0), (patch * patch * channels, width))


def _pair(name: str, path: str, weight: Layout, layer: int | None = None) -> Iterator[Entry]:
    """A weight and its bias."""
    yield Entry(f"{name}.weight", f"{path}.kernel", weight, layer)
    yield Entry(f"{name}.bias", f"{path}.bias", _vector(weight.torch_shape[0]), layer)


@dataclasses.dataclass(frozen=True)
class _LevelNames:
    """What the published code calls the parts of one level."""

    positions: str
    patches: str
    skip: str
    upsampler: str
    blocks: str


def _level_names(levels: int) -> list[_LevelNames]:
    first = _LevelNames("pos_embed", "x_embedder", "", "", "downsample_blocks")
    if levels == 2:
        first = dataclasses.replace(first, positions="pos_embed_downsampled")
        return [first, _LevelNames("pos_embed", "x_embedder_skip", "linear_skip", "upsampler", "upsample_blocks")]
    kinds = ("pos_embed", "x_embedder", "linear_skip", "upsampler", "upsample_blocks")
    return [first, *(_LevelNames(*(f"{kind}_lvl{level}" for kind in kinds)) for level in range(1, levels))]


def _entries(config: ModelConfig) -> Iterator[Entry]:
    """Every trained tensor of the published state dict."""
    width, mlp, channels = config.hidden_size, config.mlp_size, config.in_channels
    for level, names in enumerate(_level_names(len(config.depths))):
        here, patch = f"levels.{level}", config.patch_sizes[level]
        if level == 0 or config.skip:
            yield from _pair(f"{names.patches}.proj", f"{here}.patch_embed", _patch(patch, channels, width))
        if level > 0 and config.skip:
            yield from _pair(names.skip, f"{here}.skip", _linear(width, width))
        if level > 0:
            opened = width * (config.patch_sizes[level - 1] // patch) ** 2
            yield from _pair(f"{names.upsampler}.proj", f"{here}.upsample.expand", _linear(width, opened))
            yield from _pair(f"{names.upsampler}.refine", f"{here}.upsample.refine", _linear(width, width))
        for layer in range(config.depths[level]):
            theirs, ours = f"{names.blocks}.{layer}", f"{here}.blocks.layers"
            yield from _pair(f"{theirs}.attn.qkv", f"{ours}.attention.qkv", _linear(width, 3 * width), layer)
            yield from _pair(f"{theirs}.attn.proj", f"{ours}.attention.out", _linear(width, width), layer)
            yield from _pair(f"{theirs}.mlp.fc1", f"{ours}.mlp.inner", _linear(width, mlp), layer)
            yield from _pair(f"{theirs}.mlp.fc2", f"{ours}.mlp.outer", _linear(mlp, width), layer)
    yield from _time_entries(config)
    table = _kept(config.num_classes + 1, config.class_tokens * width)
    yield Entry("y_embedder.embedding_table.weight", "class_embedding.table", table)
    yield from _pair("time_modulation.1", "time_modulation", _linear(width, 6 * width))
    yield from _pair("final_layer.linear", "final", _linear(width, config.patch_sizes[-1] ** 2 * channels))


def _time_entries(config: ModelConfig) -> Iterator[Entry]:
    width = config.hidden_size
    if config.time_embedding == "sinusoidal":
        yield from _pair("t_embedder.mlp.0", "time_embedding.inner", _linear(256, width))
        yield from _pair("t_embedder.mlp.2", "time_embedding.outer", _linear(width, width))
        return
    fno = config.fno_width
    spectral = _kept(fno, fno, config.fno_modes)
    yield from _pair("t_embedder.fc0", "time_embedding.lift", _linear(1, fno))
    for layer in range(config.fno_layers):
        ours = f"time_embedding.layers.{layer}"
        yield Entry(f"t_embedder.conv{layer}.weights_real", f"{ours}.spectral.real", spectral)
        yield Entry(f"t_embedder.conv{layer}.weights_imag", f"{ours}.spectral.imaginary", spectral)
        yield from _pair(f"t_embedder.w{layer}", f"{ours}.pointwise", _pointwise(fno))
    yield from _pair("t_embedder.fc1", "time_embedding.project", _linear(fno, width))


def _positions(config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The frozen tables that PyTorch keeps in the state dict and we compute."""
    for level, names in enumerate(_level_names(len(config.depths))):
        yield names.positions, sincos_positions(config.grid(level), config.hidden_size)[None]


def infer_config(state: Mapping[str, np.ndarray], num_heads: int | None, origin: str) -> ModelConfig:
    """Read the model's shape off names and shapes.

    Raises:
        WeightsError: an entry the shape is read from is missing, or the shapes describe no model.
    """
    known = _named_fields(state)
    names = _level_names(len(known["depths"]))
    upsamplers = [f"{name.upsampler}.proj.weight" for name in names[1:]]
    ranks = {"x_embedder.proj.weight": 4, "final_layer.linear.weight": 2, "y_embedder.embedding_table.weight": 2}
    ranks |= dict.fromkeys(upsamplers, 2) | {name.positions: 3 for name in names}
    ranks["downsample_blocks.0.mlp.fc1.weight"] = 2
    fno = known["time_embedding"] == "fno"
    ranks |= {"t_embedder.conv0.weights_real": 3} if fno else {"t_embedder.mlp.0.weight": 2}
    _check_shapes_can_be_read(state, known, ranks, origin)
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        patch_sizes = [patch]
        for name in upsamplers:
            patch_sizes.append(patch_sizes[-1] // math.isqrt(state[name].shape[0] // width))
        rows, columns = state["y_embedder.embedding_table.weight"].shape
        fields: dict[str, Any] = known | {
            "patch_sizes": tuple(patch_sizes),
            "hidden_size": width,
            "input_size": _input_size(state[names[-1].positions], patch_sizes[-1], width, origin),
            "in_channels": channels,
            "num_classes": rows - 1,
            "class_tokens": columns // width,
            "mlp_ratio": state["downsample_blocks.0.mlp.fc1.weight"].shape[0] / width,
            "num_heads": _preset_heads(width, origin) if num_heads is None else num_heads,
        }
        if fno:
            fields["fno_width"], _, fields["fno_modes"] = state["t_embedder.conv0.weights_real"].shape
        return ModelConfig(**fields)
    except (ConfigError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{origin}: its shapes describe no MPDiT ({error}).") from error


def _named_fields(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields of ModelConfig that names alone tell."""
    levels = 2 if "pos_embed_downsampled" in state else 1 + _count(state, r"upsampler_lvl(\d+)\..*")
    names = _level_names(levels)
    fno = any(name.startswith(("t_embedder.fc", "t_embedder.conv", "t_embedder.w")) for name in state)
    return {
        "depths": tuple(max(1, _count(state, rf"{re.escape(name.blocks)}\.(\d+)\..*")) for name in names),
        "time_embedding": "fno" if fno else "sinusoidal",
        "fno_layers": max(1, _count(state, r"t_embedder\.conv(\d+)\..*")),
        "skip": any(f"{name.skip}.weight" in state for name in names[1:]) or levels == 1,
    }


def _check_shapes_can_be_read(
    state: Mapping[str, np.ndarray], known: dict[str, Any], ranks: Mapping[str, int], origin: str
) -> None:
    """Raise WeightsError unless what the shapes are read from is there, with as many dimensions as it should have."""
    misshapen = {name: state[name].shape for name, rank in ranks.items() if name in state and state[name].ndim != rank}
    if misshapen:
        listed = ", ".join(f"{name} is {shape}, expected {ranks[name]} dimensions" for name, shape in misshapen.items())
        raise WeightsError(f"{origin}: its shapes describe no MPDiT: {listed}.")
    if all(name in state for name in ranks):
        return
    # Names do not depend on sizes, so any config with these fields lists them.
    levels = len(known["depths"])
    sized = ModelConfig(patch_sizes=tuple(2 ** (levels - 1 - level) for level in range(levels)), **known)
    expected = [*(entry.name for entry in _entries(sized)), *(name for name, _ in _positions(sized))]
    missing = ", ".join(name for name in expected if name not in state)
    extra = ", ".join(name for name in state if name not in expected)
    raise WeightsError(
        f"{origin}: missing {missing}{f'; extra {extra}' if extra else ''}; expected the published MPDiT names "
        f"(this has {len(state)} entries, such as {', '.join(list(state)[:3]) or 'none'})."
    )


def _is_table(array: np.ndarray, table: np.ndarray) -> bool:
    """Whether `array` is that table, as precisely as the file it comes from was saved."""
    # bfloat16 and float16 are told by values that lose nothing when rounded to them once more.
    halves = (jnp.bfloat16, np.float16)
    rounded = any(np.array_equal(array.astype(half).astype(np.float32), array) for half in halves)
    return np.allclose(array, table, rtol=0, atol=HALF_PRECISION_ATOL if rounded else TABLE_ATOL)


def _count(state: Mapping[str, np.ndarray], pattern: str) -> int:
    matches = (re.fullmatch(pattern, name) for name in state)
    return len({match.group(1) for match in matches if match})


def _preset_heads(width: int, origin: str) -> int:
    for preset in PRESETS:
        config = model_config(preset)
        if config.hidden_size == width:
            return config.num_heads
    raise WeightsError(
        f"{origin}: width {width} fits no preset and shapes do not tell the number of heads; pass num_heads=…."
    )


def _input_size(table: np.ndarray, patch: int, width: int, origin: str) -> tuple[int, int]:
    """The grid whose sin-cos table this is: squares first, then every other rectangle of that many tokens."""
    tokens = table.shape[1]
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    for grid in sorted(grids, key=lambda grid: abs(grid[0] - grid[1])):
        if table.shape[-1] == width and _is_table(table[0], sincos_positions(grid, width)):
            return grid[0] * patch, grid[1] * patch
    raise WeightsError(f"{origin}: the position table {table.shape} is not the fixed sin-cos table of any grid.")


def _check_entries(state: Mapping[str, np.ndarray], config: ModelConfig, origin: str) -> None:
    expected = {entry.name: entry.layout.torch_shape for entry in _entries(config)}
    tables = dict(_positions(config))
    expected.update({name: table.shape for name, table in tables.items()})
    shared = [name for name in expected if name in state]
    misshapen = [name for name in shared if state[name].shape != expected[name]]
    fitting = [name for name in shared if name not in misshapen]
    problems = {
        "missing": [name for name in expected if name not in state],
        "extra": [name for name in state if name not in expected],
        "misshapen": [f"{name} is {state[name].shape} instead of {expected[name]}" for name in misshapen],
        "not finite": [name for name in fitting if not np.isfinite(state[name]).all()],
        "not the fixed sin-cos position table": [
            name for name in fitting if name in tables and not _is_table(state[name], tables[name])
        ],
    }
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise WeightsError(
            f"{origin} does not fit the model it describes (depths {config.depths}, width {config.hidden_size}): "
            f"{'; '.join(found)}."
        )
