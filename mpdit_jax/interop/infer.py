"""Inference of a model's config from the names and shapes of a published PyTorch state dict, even a damaged one."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpdit_jax.errors import ConfigError, WeightsError
from mpdit_jax.interop.files import compare_shapes
from mpdit_jax.interop.published_names import CLASS_TABLE, DIT_NAMES, LevelNames, expected_shapes, is_dit, level_names
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.embeddings import sincos_positions

# Tolerances of position tables, for files in float32 and in half precision.
TABLE_ATOL = 1e-5
HALF_PRECISION_ATOL = 1e-2
MAX_CANDIDATES = 500  # an intact state dict has one, a damaged entry adds a few

State = Mapping[str, np.ndarray]


def infer_config(state: State, origin: str, *, null_class: bool = True) -> ModelConfig:
    """Infer the config of a state dict, with num_heads=1 because the shapes do not show the heads.

    `null_class` says whether the last row of the class table is that of the null class.

    Most sizes appear in several entries. If entries disagree, the config that the fewest entries contradict is chosen,
    so that error messages compare a damaged state dict with the intended model. Raise WeightsError if no combination of
    the sizes is a valid model.
    """
    first_error: ConfigError | None = None
    best: tuple[int, ModelConfig] | None = None
    for fields in itertools.islice(_candidates(state, null_class), MAX_CANDIDATES):
        try:
            config = ModelConfig(num_heads=1, null_class=null_class, **fields)
        except ConfigError as error:
            first_error = first_error or error
            continue
        problems = sum(map(len, compare_shapes(state, expected_shapes(config)).values()))
        if best is None or problems < best[0]:
            best = problems, config
    if best is None:
        raise WeightsError(f"{origin}: its shapes describe no MPDiT ({first_error}).") from first_error
    return best[1]


def is_table(array: np.ndarray, table: np.ndarray) -> bool:
    """Return whether `array` is the position table up to the precision in which it was saved."""
    # A saved dtype of bfloat16 or float16 is detected by rounding to it, which then changes nothing.
    dtypes = (jnp.bfloat16, np.float16)
    is_half = any(np.array_equal(array.astype(dtype).astype(np.float32), array) for dtype in dtypes)
    return np.allclose(array, table, rtol=0, atol=HALF_PRECISION_ATOL if is_half else TABLE_ATOL)


def _candidates(state: State, null_class: bool) -> Iterator[dict[str, Any]]:
    """Yield all combinations of the sizes that the entries show: exactly one if all entries agree."""
    dit = is_dit(state)
    names = [DIT_NAMES] if dit else level_names(_count_levels(state))
    sizes = _Sizes(state)
    blocks = rf"(?:{'|'.join(re.escape(name.blocks) for name in names)})\.\d+"
    width = sizes.first(
        (rf"{blocks}\.attn\.(?:qkv|proj)\.weight", 1, 2),
        (rf"{blocks}\.(?:attn\.proj|mlp\.fc2)\.bias", 0, 1),
        default=768,
    )
    mlp = sizes.first(
        (rf"{blocks}\.mlp\.fc1\.weight", 0, 2),
        (rf"{blocks}\.mlp\.fc1\.bias", 0, 1),
        (rf"{blocks}\.mlp\.fc2\.weight", 1, 2),
        default=4 * width,
    )
    table = re.escape(CLASS_TABLE)
    fno = any(name.startswith(("t_embedder.fc", "t_embedder.conv", "t_embedder.w")) for name in state)
    skips = tuple(f"{part}." for name in names[1:] for part in (name.skip, name.patches))
    fields: dict[str, Any] = {
        "depths": tuple(_count(state, rf"{re.escape(name.blocks)}\.(\d+)\..*") for name in names),
        "hidden_size": width,
        "mlp_ratio": mlp / width,
        "num_classes": max(1, sizes.first((table, 0, 2), default=1001) - null_class),
        "condition": "vector" if dit else "tokens",
        "modulation": "per_block" if dit else "shared",
        "time_embedding": "fno" if fno else "sinusoidal",
        "skip": not skips or any(name.startswith(skips) for name in state),
    }
    if not dit:
        fields["class_tokens"] = max(1, sizes.first((table, 1, 2), default=16 * width) // width)
    if fno:
        spectral = r"t_embedder\.conv\d+\.weights_(?:real|imag)"
        fields |= {
            "fno_width": sizes.first((spectral, 0, 3), default=32),
            "fno_modes": sizes.first((spectral, 2, 3), default=16),
            "fno_layers": _count(state, r"t_embedder\.(?:conv|w)(\d+)\..*"),
        }
    tables = {level: state[name.positions] for level, name in enumerate(names) if name.positions in state}
    grids = {level: grid for level, array in tables.items() if (grid := _grid(array, width)) is not None}
    if not grids:  # no table has the right values, so use the shapes alone
        grids = {level: shaped[0] for level, array in tables.items() if (shaped := _shaped_grids(array, width))}
    patch_embeds = "|".join(re.escape(f"{name.patches}.proj.weight") for name in names)
    for channels in sizes.all((patch_embeds, 1, 4)) or [4]:
        for patch_sizes in _patch_sizes(sizes, names, grids, width, channels):
            input_sizes = [
                (rows * patch_sizes[level], columns * patch_sizes[level]) for level, (rows, columns) in grids.items()
            ]
            for input_size in dict.fromkeys(input_sizes) or [(8 * patch_sizes[0],) * 2]:
                yield fields | {"in_channels": channels, "patch_sizes": patch_sizes, "input_size": input_size}


def _patch_sizes(
    sizes: "_Sizes", names: list[LevelNames], grids: Mapping[int, tuple[int, int]], width: int, channels: int
) -> Iterator[tuple[int, ...]]:
    """Yield patch sizes from every size that the entries show for the finest patch and for the ratios of levels."""
    embeds = [re.escape(f"{name.patches}.proj.weight") for name in names]
    patches = [sizes.all((embed, 2, 4), (embed, 3, 4)) for embed in embeds]
    final = r"final_layer\.linear\."
    pixels = [size // channels for size in sizes.all((rf"{final}weight", 0, 2), (rf"{final}bias", 0, 1))]
    finest = dict.fromkeys([*map(math.isqrt, pixels), *patches[-1]]) or [2]
    ratios: list[Iterable[int]] = []
    for level in range(1, len(names)):
        upsampler = re.escape(f"{names[level].upsampler}.proj.")
        expanded = sizes.all((rf"{upsampler}weight", 0, 2), (rf"{upsampler}bias", 0, 1))
        candidates = [math.isqrt(size // width) for size in expanded]
        candidates += [coarse // fine for coarse in patches[level - 1] for fine in patches[level] if fine]
        if level in grids and level - 1 in grids:
            candidates.append(grids[level][0] // grids[level - 1][0])
        ratios.append(dict.fromkeys(candidates) or [2])
    for fine, *steps in itertools.product(finest, *reversed(ratios)):
        yield tuple(reversed([*itertools.accumulate(steps, int.__mul__, initial=fine)]))


class _Sizes:
    """Sizes of the entries' axes, the most frequent first.

    A place is (pattern of the name, axis, number of dimensions). Entries with another number of dimensions are skipped.
    """

    def __init__(self, state: State) -> None:
        self.shapes = {name: array.shape for name, array in state.items()}

    def all(self, *places: tuple[str, int, int]) -> list[int]:
        """Return the distinct sizes in any of the places."""
        counts = Counter(
            shape[axis]
            for pattern, axis, dimensions in places
            for name, shape in self.shapes.items()
            if len(shape) == dimensions and re.fullmatch(pattern, name)
        )
        return [size for size, _ in counts.most_common() if size > 0]

    def first(self, *places: tuple[str, int, int], default: int) -> int:
        """Return the most frequent size in the places, or the default."""
        return next(iter(self.all(*places)), default)


def _count_levels(state: State) -> int:
    two_levels = ("pos_embed_downsampled", "x_embedder_skip.", "linear_skip.", "upsampler.", "upsample_blocks.")
    if any(name.startswith(two_levels) for name in state):
        return 2
    return 1 + len({match.group(1) for name in state if (match := re.search(r"_lvl(\d+)(?:\.|$)", name))})


def _count(state: State, pattern: str) -> int:
    """Count the layers by the largest number in their names, unless more than half are missing; at least 1."""
    numbers = {int(match.group(1)) for name in state if (match := re.fullmatch(pattern, name))}
    return min(max(numbers) + 1, 2 * len(numbers)) if numbers else 1


def _grid(table: np.ndarray, width: int) -> tuple[int, int] | None:
    """Return the grid whose sin-cos table this is, or None."""
    grids = _shaped_grids(table, width)
    return next((grid for grid in grids if is_table(table[0], sincos_positions(grid, width))), None)


def _shaped_grids(table: np.ndarray, width: int) -> list[tuple[int, int]]:
    """Return the grids with as many tokens as the table, most square first; [] if it has not a table's shape."""
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != width or not table.shape[1] or width % 4:
        return []
    tokens = table.shape[1]
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    return sorted(grids, key=lambda grid: abs(grid[0] - grid[1]))
