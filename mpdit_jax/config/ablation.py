"""The rows of the paper's tables, and the config that trains each; configs/ablation.py and tables.py share them."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from mpdit_jax.config.base import base_config
from mpdit_jax.errors import ConfigError
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.presets import preset_config
from mpdit_jax.validation import suggest


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of one table.

    Attributes:
        table, preset, fields: the comparison it belongs to, the model that it changes, and the changes.
        params, gmacs, fid: millions of parameters, "GFLOPs" and FID as the paper prints them, "" where it prints none.
            FID is of ImageNet at 256x256 pixels after 80 epochs, unguided, unless the note says otherwise.
        mask_ratio: fraction of tokens hidden in masked training.
        note: a remark for the reader.
    """

    table: str
    preset: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    params: str = ""
    gmacs: str = ""
    fid: str = ""
    mask_ratio: float = 0.0
    note: str = ""

    @property
    def model(self) -> ModelConfig:
        """The model of the row."""
        return preset_config(self.preset, **self.fields)


_LADDER, _TOKENS, _TIME = "ablation ladder", "class tokens", "time embedding"
_UPSAMPLER, _DEPTH, _REDUCTION = "upsampler", "blocks on fine tokens", "token reduction"
_LARGE = "512x512 pixels"
_BASE_FID, _BASE = "24.74", "the base of all B rows"
_SHARED = {"modulation": "shared"}
_CLASS_TOKENS = {**_SHARED, "condition": "tokens"}
_DENSE = {**_CLASS_TOKENS, "time_embedding": "fno"}


def _vary(table: str, prefix: str, field: str, fids: dict[Any, str], **others: Any) -> dict[str, Row]:
    """Rows of MPDiT-B that differ in one field: `fids` has the FID of each of its values."""
    return {
        f"{prefix}_{value}": Row(
            table, "mpdit_b", {**others, field: value}, fid=fid, note=_BASE if fid == _BASE_FID else ""
        )
        for value, fid in fids.items()
    }


ROWS: dict[str, Row] = {
    "dit_b_2": Row(_LADDER, "dit_b_2", {}, "130.0", "23.0"),
    "dit_b_2_shared": Row(_LADDER, "dit_b_2", _SHARED, "90.3", "22.9", note="one modulation for all blocks"),
    "dit_b_2_shared_tokens": Row(_LADDER, "dit_b_2", _CLASS_TOKENS, "101.9", "24.3", note="16 class tokens"),
    "dit_b_2_shared_tokens_fno": Row(_LADDER, "dit_b_2", _DENSE, "101.2", "24.3", note="the dense top of the ladder"),
    "mpdit_b_k4": Row(_DEPTH, "mpdit_b", {"depths": (8, 4)}, "104.8", "13.9", "26.94"),
    "mpdit_b_k6": Row(_DEPTH, "mpdit_b", {"depths": (6, 6)}, "104.8", "16.6", _BASE_FID, note=_BASE),
    "mpdit_b_k8": Row(_DEPTH, "mpdit_b", {"depths": (4, 8)}, "104.8", "19.3", "24.62"),
    "dense_xl": Row(_DEPTH, "dit_xl_2", _DENSE, "473.1", "125.5", "9.22", note="28 blocks, all on fine tokens"),
    "mpdit_xl_k4": Row(_DEPTH, "mpdit_xl", {"depths": (24, 4)}, "481.2", "53.2", "11.11"),
    "mpdit_xl_k6": Row(_DEPTH, "mpdit_xl", {"depths": (22, 6)}, "481.2", "59.3", "9.92"),
    "mpdit_xl_k8": Row(_DEPTH, "mpdit_xl", {"depths": (20, 8)}, "481.2", "65.4", "9.73"),
    **_vary(_TOKENS, "class_tokens", "class_tokens", {1: "32.31", 4: "30.91", 8: "28.12", 16: _BASE_FID, 32: "24.47"}),
    **_vary(
        _TIME, "time_linear", "sinusoidal_layers", {1: "28.98", 2: "27.92", 3: "29.71"}, time_embedding="sinusoidal"
    ),
    **_vary(_TIME, "time_fno", "fno_layers", {2: "26.87", 3: _BASE_FID, 4: "27.37"}),
    "time_fno_width_128": Row(_TIME, "mpdit_b", {"fno_width": 128}, note="the paper reports unstable training"),
    "time_fno_width_32_scaled": Row(
        _TIME, "mpdit_b", {"fno_init": "scaled"}, note="not in the paper: the effect of the initialization alone"
    ),
    "time_fno_width_128_scaled": Row(
        _TIME,
        "mpdit_b",
        {"fno_width": 128, "fno_init": "scaled"},
        note="not in the paper: compare with time_fno_width_32_scaled, see docs/fno_width.md",
    ),
    **_vary(_UPSAMPLER, "upsampler", "upsampler", {"linear_linear": _BASE_FID, "linear": "27.06"}),
    **_vary(_UPSAMPLER, "upsampler", "upsampler", {"linear_mlp": "24.85", "linear_conv": "25.68"}),
    **_vary(_UPSAMPLER, "upsampler", "upsampler", {"conv_transpose": "29.45"}),
    "dit_xl_2": Row(
        _REDUCTION,
        "dit_xl_2",
        gmacs="118.66",
        fid="9.62",
        note="FID after 1,400 epochs with DiT's own objective; this code trains by flow matching, as sit_xl_2",
    ),
    "dit_xl_4": Row(_REDUCTION, "dit_xl_4", fid="about 40", note="a quarter of the tokens by larger patches"),
    "sit_xl_2": Row(_REDUCTION, "dit_xl_2", gmacs="118.66", fid="18.04", note="DiT-XL/2's network, flow matching"),
    "dit_xl_2_masked_75": Row(
        _REDUCTION,
        "dit_xl_2",
        {"decoder_depth": 8},
        fid="about 100",
        mask_ratio=0.75,
        note="the paper does not give the depth of the decoder; with MaskDiT's 8 blocks training costs as much as "
        "mpdit_xl_k6; GMACs are of sampling, which sees every token",
    ),
    "mpdit_xl_512": Row(_LARGE, "mpdit_xl", {"input_size": (64, 64)}, fid="9.24", note="120 epochs, batches of 256"),
    "mpdit3_xl_512": Row(_LARGE, "mpdit3_xl_paper", {}, "491", "138.2", "11.77", note="120 epochs, batches of 256"),
}
ABLATIONS = [name for name, row in ROWS.items() if row.table != _LARGE]
"""Rows that `ablation_config` trains; the others have a config of their own name."""


def ablation_config(name: str) -> ConfigDict:
    """Return the paper's recipe for its comparisons with one row's model: ImageNet at 256x256 pixels, 80 epochs.

    Raises:
        ConfigError: no such row; the message names the nearest, or all.
    """
    if name not in ABLATIONS:
        near = suggest(name, ABLATIONS) or f": expected ablation:NAME with one of {', '.join(ABLATIONS)}"
        raise ConfigError(f"no row {name!r}{near}; `python -m mpdit_jax.tables` describes them.")
    row, config = ROWS[name], base_config()
    config.steps = 100_000  # 80 epochs of 1,281,167 images
    config.mask_ratio = row.mask_ratio
    config.model.preset = row.preset
    config.model.dtype = "bfloat16"
    config.model.num_classes = 1000
    config.model.in_channels = 4
    config.model.input_size = (32, 32)
    config.model.update(row.fields)
    config.data.name = "latents"
    config.data.path = "latents/imagenet256"
    config.data.normalization = "paper"
    config.checkpoint.keep_every = 50_000
    config.sample.every = 0
    return config


def list_rows() -> str:
    """Return a line on every row that `ablation_config` trains: its model, the paper's figures and the note."""
    lines = [
        "Rows of the paper's tables. Parameters, GFLOPs and FID are the paper's, not ours. Train one with",
        "  python -m mpdit_jax.train --config=ablation:NAME --workdir=runs/NAME",
    ]
    table = ""
    for name in ABLATIONS:
        row = ROWS[name]
        if row.table != table:
            table = row.table
            lines += ["", table]
        changes = [f"{field}={value}" for field, value in row.fields.items()]
        changes += [f"mask_ratio={row.mask_ratio}"] if row.mask_ratio else []
        figures = ((row.params, "{} M parameters"), (row.gmacs, "{} GFLOPs"), (row.fid, "FID {}"), (row.note, "{}"))
        parts = [" ".join([row.preset, *changes]), *(text.format(value) for value, text in figures if value)]
        lines.append(f"  {name:27}{'; '.join(parts)}")
    return "\n".join(lines)
