"""The rows of the paper's tables: what each changes about the model, and the figures the paper prints for it.

FIDs are the paper's, of ImageNet at 256x256 pixels after 80 epochs without guidance, unless a note says otherwise. The
file of the same name in configs/ablations/, or in configs/ for 512 pixels, trains a row.
"""

import dataclasses
from typing import Any

from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.presets import preset_config


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of one table.

    Attributes:
        table: which comparison it belongs to.
        preset: the model that it changes.
        fields: the changes.
        params: the paper's millions of parameters, as printed; "" where it prints none.
        gmacs: the paper's "GFLOPs", as printed.
        fid: the paper's FID.
        mask_ratio: of masked training.
        note: what a reader has to know.
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
        """The whole config."""
        return preset_config(self.preset, **self.fields)


SHARED = {"modulation": "shared"}
TOKENS = {**SHARED, "condition": "tokens"}
DENSE = {**TOKENS, "time_embedding": "fno"}

_LADDER, _TOKENS, _TIME = "ablation ladder", "class tokens", "time embedding"
_UPSAMPLER, _DEPTH, _REDUCTION = "upsampler", "blocks on fine tokens", "token reduction"
_LARGE = "512x512 pixels"

ROWS: dict[str, Row] = {
    "dit_b_2": Row(_LADDER, "dit_b_2", {}, "130.0", "23.0"),
    "dit_b_2_shared": Row(_LADDER, "dit_b_2", SHARED, "90.3", "22.9"),
    "dit_b_2_shared_tokens": Row(_LADDER, "dit_b_2", TOKENS, "101.9", "24.3"),
    "dit_b_2_shared_tokens_fno": Row(_LADDER, "dit_b_2", DENSE, "101.2", "24.3"),
    "mpdit_b_k4": Row(_DEPTH, "mpdit_b", {"depths": (8, 4)}, "104.8", "13.9", "26.94"),
    "mpdit_b_k6": Row(_DEPTH, "mpdit_b", {"depths": (6, 6)}, "104.8", "16.6", "24.74", note="the base of all B rows"),
    "mpdit_b_k8": Row(_DEPTH, "mpdit_b", {"depths": (4, 8)}, "104.8", "19.3", "24.62"),
    "dense_xl": Row(_DEPTH, "dit_xl_2", DENSE, "473.1", "125.5", "9.22", note="28 blocks, all on fine tokens"),
    "mpdit_xl_k4": Row(_DEPTH, "mpdit_xl", {"depths": (24, 4)}, "481.2", "53.2", "11.11"),
    "mpdit_xl_k6": Row(_DEPTH, "mpdit_xl", {"depths": (22, 6)}, "481.2", "59.3", "9.92"),
    "mpdit_xl_k8": Row(_DEPTH, "mpdit_xl", {"depths": (20, 8)}, "481.2", "65.4", "9.73"),
    **{
        f"class_tokens_{count}": Row(_TOKENS, "mpdit_b", {"class_tokens": count}, fid=fid)
        for count, fid in ((1, "32.31"), (4, "30.91"), (8, "28.12"), (16, "24.74"), (32, "24.47"))
    },
    **{
        f"time_linear_{count}": Row(
            _TIME, "mpdit_b", {"time_embedding": "sinusoidal", "sinusoidal_layers": count}, fid=fid
        )
        for count, fid in ((1, "28.98"), (2, "27.92"), (3, "29.71"))
    },
    **{
        f"time_fno_{count}": Row(_TIME, "mpdit_b", {"fno_layers": count}, fid=fid)
        for count, fid in ((2, "26.87"), (3, "24.74"), (4, "27.37"))
    },
    "time_fno_width_128": Row(_TIME, "mpdit_b", {"fno_width": 128}, note="unstable in training, says the paper"),
    "time_fno_width_32_scaled": Row(
        _TIME, "mpdit_b", {"fno_init": "scaled"}, note="not of the paper: see docs/fno_width.md"
    ),
    "time_fno_width_128_scaled": Row(
        _TIME, "mpdit_b", {"fno_width": 128, "fno_init": "scaled"}, note="not of the paper: see docs/fno_width.md"
    ),
    **{
        f"upsampler_{name}": Row(_UPSAMPLER, "mpdit_b", {"upsampler": name}, fid=fid)
        for name, fid in (
            ("linear_linear", "24.74"),
            ("linear", "27.06"),
            ("linear_mlp", "24.85"),
            ("linear_conv", "25.68"),
            ("conv_transpose", "29.45"),
        )
    },
    "dit_xl_2": Row(_REDUCTION, "dit_xl_2", {}, "", "118.66", "9.62", note="FID after 1,400 epochs"),
    "dit_xl_4": Row(_REDUCTION, "dit_xl_4", {}, fid="40", note="FID: about"),
    "sit_xl_2": Row(_REDUCTION, "dit_xl_2", {}, "", "118.66", "18.04", note="DiT-XL/2's network, flow matching"),
    "dit_xl_2_masked_75": Row(
        _REDUCTION, "dit_xl_2", {"decoder_depth": 8}, fid="100", mask_ratio=0.75, note="FID: about; MACs of sampling"
    ),
    "mpdit_xl_512": Row(_LARGE, "mpdit_xl", {"input_size": (64, 64)}, fid="9.24", note="120 epochs, batches of 256"),
    "mpdit3_xl_512": Row(_LARGE, "mpdit3_xl_paper", {}, "491", "138.2", "11.77", note="120 epochs, batches of 256"),
}
