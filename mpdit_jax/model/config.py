"""`ModelConfig`: the architecture and numerics of a model, checked on creation."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal

from mpdit_jax.errors import ConfigError
from mpdit_jax.validation import is_whole, suggest

TIME_EMBEDDINGS = ("fno", "sinusoidal")
FNO_INITS = ("paper", "scaled")
UPSAMPLERS = ("linear_linear", "linear", "linear_mlp", "linear_conv", "conv_transpose")
MODULATIONS = ("shared", "per_block")
CONDITIONS = ("tokens", "vector")
CONVENTIONS = ("velocity", "sit", "dit")
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "dots", "full")
ATTENTIONS = ("xla", "cudnn")
PLATFORMS = ("auto", "cpu", "gpu", "tpu")
_LARGEST = 2**24  # upper limit of every size
FNO_GRID = 32  # points of the FNO time embedding's grid
_ONE_LEVEL = "one level"
# Kind of model: (fields that it does not use, the reason).
_UNUSED = {
    "vector": (("class_tokens",), "condition='vector' has no class tokens"),
    "sinusoidal": (("fno_width", "fno_modes", "fno_layers", "fno_init"), "time_embedding='sinusoidal' has no FNO"),
    "fno": (("sinusoidal_layers",), "time_embedding='fno' has no such layers"),
    _ONE_LEVEL: (("upsampler", "skip"), "patch_sizes={patch_sizes} is one level"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture and numerics of one MPDiT. Hashable; impossible values raise ConfigError.

    Lists are converted to tuples, NumPy numbers to Python's.

    Attributes:
        patch_sizes: patch size of each level, coarse to fine; each divides the previous one. The paper has (4, 2).
        depths: number of transformer blocks of each level.
        hidden_size: token width D, divisible by num_heads and by 4.
        num_heads: number of attention heads.
        input_size: latent height and width (one number for a square).
        in_channels: number of latent channels.
        num_classes: number of classes; label `num_classes` is the null class of classifier-free guidance.
        null_class: whether the null class was trained (config.label_dropout > 0). Otherwise its row of the class table
            means nothing, and guidance by it is refused.
        mlp_ratio: hidden width of the MLP, divided by D.
        condition: class conditioning: "tokens" in front of the image tokens (paper), or a "vector" added to the time
            vector (DiT).
        class_tokens: number of class tokens if condition="tokens".
        modulation: "shared" by all blocks and the final layer (paper), or "per_block" (DiT).
        time_embedding: "fno" (paper) or "sinusoidal" (DiT).
        fno_width, fno_modes, fno_layers: channels, Fourier modes and layers of the FNO time embedding.
        fno_init: "paper", or "scaled": output and gradients do not grow with fno_width (see `model.fno`).
        sinusoidal_layers: linear layers of the sinusoidal time embedding; DiT has 2.
        upsampler: upsampler between levels: "linear_linear" (paper), "linear", "linear_mlp", "linear_conv" or
            "conv_transpose" (see `model.upsample`).
        skip: whether a finer level adds a linear projection of its own patches to its image tokens.
        decoder_depth: number of last blocks that see all tokens in masked training of a model of one level
            (config.mask_ratio, see `model.masking`); 0 for a model without masked training.
        flow_map: whether the model was trained as a flow map (config.objective), so that `model(x, t, y, r)` is the
            average velocity from t to r. It changes no parameter.
        guidance_max: largest guidance scale w that a flow map takes as an input, so that guidance needs one pass; 1
            for no such input. Above 1 the model has one more linear map, initially zero.
        convention: convention of the output: "velocity" (noise minus data, t = 0 at the data), "sit" or "dit";
            `mpdit_jax.as_velocity` converts the last two.
        dtype: compute dtype of linear layers and attention, "float32" or "bfloat16". Parameters, norms, softmax, FFT
            and the output are always float32.
        remat: what the backward pass recomputes of a block: "none" (norms, modulations and GELU; on CPUs also
            attention), "dots" (all but the products with weights) or "full" (everything).
        attention: "xla" on any device, or "cudnn" on NVIDIA GPUs.
        platform: choose the arithmetic that is fastest on "cpu", "gpu" or "tpu", or "auto" for JAX's default device.
            Each runs on any device; values agree up to rounding.
    """

    patch_sizes: tuple[int, ...] = (4, 2)
    depths: tuple[int, ...] = (6, 6)
    hidden_size: int = 768
    num_heads: int = 12
    input_size: tuple[int, int] = (32, 32)
    in_channels: int = 4
    num_classes: int = 1000
    null_class: bool = True
    mlp_ratio: float = 4.0
    condition: str = "tokens"
    class_tokens: int = 16
    modulation: str = "shared"
    time_embedding: str = "fno"
    fno_width: int = 32
    fno_modes: int = 16
    fno_layers: int = 3
    fno_init: str = "paper"
    sinusoidal_layers: int = 2
    upsampler: str = "linear_linear"
    skip: bool = True
    decoder_depth: int = 0
    flow_map: bool = False
    guidance_max: float = 1.0
    convention: str = "velocity"
    dtype: str = "float32"
    remat: str = "none"
    attention: Literal["xla", "cudnn"] = "xla"
    platform: str = "auto"

    def __post_init__(self) -> None:
        for name in ("patch_sizes", "depths", "input_size"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        for name in ("mlp_ratio", "guidance_max"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name in ("hidden_size", "num_heads", "in_channels", "num_classes", "class_tokens"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        for name in ("fno_width", "fno_modes", "fno_layers", "sinusoidal_layers"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        for name in ("null_class", "skip", "flow_map"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"model.{name}={getattr(self, name)!r}: expected True or False.")
        _choice("time_embedding", self.time_embedding, TIME_EMBEDDINGS)
        _choice("fno_init", self.fno_init, FNO_INITS)
        _choice("upsampler", self.upsampler, UPSAMPLERS)
        _choice("condition", self.condition, CONDITIONS)
        _choice("modulation", self.modulation, MODULATIONS)
        _choice("convention", self.convention, CONVENTIONS)
        _choice("dtype", self.dtype, DTYPES)
        _choice("remat", self.remat, REMAT_POLICIES)
        _choice("attention", self.attention, ATTENTIONS)
        _choice("platform", self.platform, PLATFORMS)
        self._check_levels()
        self._check_widths()
        self._check_unused()
        self._check_decoder()
        self._check_flow_map()

    def _check_levels(self) -> None:
        if len(self.patch_sizes) != len(self.depths):
            raise ConfigError(
                f"model.patch_sizes={self.patch_sizes} has {len(self.patch_sizes)} level(s) and "
                f"model.depths={self.depths} has {len(self.depths)}: give one depth for each patch size."
            )
        for coarse, fine in zip(self.patch_sizes, self.patch_sizes[1:], strict=False):
            if coarse <= fine or coarse % fine:
                raise ConfigError(
                    f"model.patch_sizes={self.patch_sizes}: {fine} must be smaller than {coarse} and divide it; "
                    "list patch sizes coarse to fine, such as (4, 2)."
                )
        if len(self.input_size) == 1:
            object.__setattr__(self, "input_size", self.input_size * 2)
        if len(self.input_size) != 2:
            raise ConfigError(f"model.input_size={self.input_size}: expected one number or (height, width).")
        for side in self.input_size:
            if side % self.patch_sizes[0]:
                raise ConfigError(
                    f"model.input_size={self.input_size} does not divide into patches of {self.patch_sizes[0]}: "
                    f"both sides must be multiples of {self.patch_sizes[0]} (pad the data or change patch_sizes)."
                )

    def _check_widths(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}: "
                "every head has an equal share of the width."
            )
        if self.hidden_size % 4:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not divisible by 4, which the 2-D sin-cos positions need."
            )
        if self.mlp_ratio <= 0 or not 1 <= self.mlp_size <= _LARGEST:
            raise ConfigError(f"model.mlp_ratio={self.mlp_ratio}: expected a positive number, such as 4.0.")
        if self.fno_modes > FNO_GRID // 2 + 1:
            raise ConfigError(
                f"model.fno_modes={self.fno_modes}: a grid of {FNO_GRID} points has {FNO_GRID // 2 + 1} Fourier modes; "
                "use that many or fewer."
            )

    def _check_unused(self) -> None:
        for name, reason in self.unused_fields().items():
            value, default = vars(self)[name], vars(ModelConfig)[name]
            if value != default:
                raise ConfigError(
                    f"model.{name}={value!r} would change nothing, since {reason}: leave it at {default!r}."
                )

    def _check_decoder(self) -> None:
        if not is_whole(self.decoder_depth) or self.decoder_depth < 0:
            raise ConfigError(f"model.decoder_depth={self.decoder_depth!r}: expected a whole number, 0 or more.")
        object.__setattr__(self, "decoder_depth", int(self.decoder_depth))
        if self.decoder_depth and len(self.depths) > 1:
            raise ConfigError(
                f"model.decoder_depth={self.decoder_depth} with patch_sizes={self.patch_sizes}: random masking is for "
                "isotropic models, of one level; give one patch size, or decoder_depth=0."
            )
        if self.decoder_depth and self.decoder_depth >= self.depths[0]:
            raise ConfigError(
                f"model.decoder_depth={self.decoder_depth} leaves no block of {self.depths[0]} to the trunk: use fewer."
            )

    def _check_flow_map(self) -> None:
        if self.flow_map and (self.decoder_depth or self.convention != "velocity"):
            raise ConfigError(
                f"model.flow_map=True with decoder_depth={self.decoder_depth}, convention={self.convention!r}: a flow "
                "map needs decoder_depth=0 and convention='velocity'."
            )
        if not 1 <= self.guidance_max <= 100:
            raise ConfigError(f"model.guidance_max={self.guidance_max:g}: expected a scale from 1 (no input) to 100.")

    def unused_fields(self) -> dict[str, str]:
        """Return the fields that this model does not use, and so must keep their defaults, with the reason."""
        kinds = {self.condition, self.time_embedding, *([_ONE_LEVEL] if len(self.depths) == 1 else [])}
        return {
            name: reason.format(patch_sizes=self.patch_sizes)
            for kind, (names, reason) in _UNUSED.items()
            if kind in kinds
            for name in names
        }

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP, rounded down as in the published code."""
        return int(self.hidden_size * self.mlp_ratio + 1e-6)  # 1e-6: mlp_ratio = w / hidden_size must give w again

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens in front of the image tokens."""
        return self.class_tokens if self.condition == "tokens" else 0

    @property
    def tail_depth(self) -> int:
        """Number of last blocks that a flow map conditions on the end time r: the last level's; of a single level, a
        quarter of its blocks (at least one).
        """
        return self.depths[-1] if len(self.depths) > 1 else max(1, self.depths[0] // 4)

    def grid(self, level: int) -> tuple[int, int]:
        """Return the rows and columns of image tokens at `level`."""
        height, width = self.input_size
        return height // self.patch_sizes[level], width // self.patch_sizes[level]

    def replace(self, **changes: Any) -> "ModelConfig":
        """Return a copy with changed fields, checked again; an unknown field raises ConfigError."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown model field {name!r}{suggest(name, known)}; fields: {', '.join(known)}.")
        return dataclasses.replace(self, **changes)


def drop_unused(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored model config without those that the model does not use.

    Older versions stored such fields with any value; in a new config they raise ConfigError.
    """
    optional = {name for names, _ in _UNUSED.values() for name in names}
    rest = {name: value for name, value in fields.items() if name not in optional}
    unused = ModelConfig().replace(**rest).unused_fields()
    return {name: value for name, value in fields.items() if name not in unused}


def _integers(name: str, value: Any) -> tuple[int, ...]:
    items = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not items or not all(is_whole(item) and item > 0 for item in items):
        raise ConfigError(f"model.{name}={value!r}: expected positive whole numbers, such as (4, 2).")
    if max(items) > _LARGEST:
        raise ConfigError(f"model.{name}={value!r}: expected {_LARGEST:,} at most.")
    return tuple(int(item) for item in items)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ConfigError(f"model.{name}={value!r}: expected a finite number.")
    return float(value)


def _positive(name: str, value: Any) -> int:
    if not is_whole(value) or value < 1:
        raise ConfigError(f"model.{name}={value!r}: expected a positive whole number.")
    if value > _LARGEST:
        raise ConfigError(f"model.{name}={value!r}: expected {_LARGEST:,} at most.")
    return int(value)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = suggest(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"model.{name}={value!r}{hint}: expected one of {', '.join(choices)}.")
