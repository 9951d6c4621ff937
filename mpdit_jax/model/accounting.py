"""Parameters and multiply-adds (MACs) of a model, computed from its config alone."""

from typing import NamedTuple, Protocol, runtime_checkable

from mpdit_jax.errors import InputError
from mpdit_jax.model.config import FNO_GRID, ModelConfig
from mpdit_jax.model.embeddings import GUIDANCE_FEATURES, TIME_FEATURES
from mpdit_jax.model.masking import kept_tokens
from mpdit_jax.model.upsample import CONV_KERNEL, TRANSPOSED_KERNEL

PAPER_TOKENS = 256  # sequence length at which the paper counts the attention of every block


@runtime_checkable
class HasConfig(Protocol):
    """A model, also one converted by `mpdit_jax.as_velocity`."""

    @property
    def config(self) -> ModelConfig:
        """The model's config."""


def count(model: HasConfig | ModelConfig) -> tuple[int, int]:
    """Count the parameters and multiply-adds of a model.

    Returns:
        params: parameters as PyTorch counts them, the frozen position table of every level included.
        macs: multiply-adds of the matrix products of one forward pass of one example. Attention counts at the sequence
            length of each block; norms, activations and Fourier transforms count as zero.

    Raises:
        InputError: `model` is neither a model nor a ModelConfig.
    """
    config = model.config if isinstance(model, HasConfig) else model
    if not isinstance(config, ModelConfig):
        raise InputError(f"model={type(model).__name__}: expected a model or a ModelConfig.")
    return count_parameters(config), count_macs(config)


def count_parameters(config: ModelConfig) -> int:
    """Count the trained parameters and the position tables, which PyTorch keeps as frozen parameters."""
    width = config.hidden_size
    per_block = sum(config.depths) * _affine(width, 6 * width) + _affine(width, 2 * width)
    total = _time_parameters(config) + (_affine(width, 6 * width) if config.modulation == "shared" else per_block)
    total += (config.num_classes + 1) * (config.class_tokens if config.condition == "tokens" else 1) * width
    total += width if config.decoder_depth else 0
    total += _affine(GUIDANCE_FEATURES, width) if config.guidance_max > 1 else 0
    for level, depth in enumerate(config.depths):
        total += depth * _block_parameters(config) + _tokens(config, level) * width
        if level == 0 or config.skip:
            total += _affine(_patch_features(config, level), width)
        if level > 0:
            total += _upsampler(config, level).parameters
        if level > 0 and config.skip:
            total += _affine(width, width)
    return total + _affine(width, _patch_features(config, -1))


def count_trained(config: ModelConfig) -> int:
    """Count the trained parameters, without the position tables."""
    tables = sum(_tokens(config, level) for level in range(len(config.depths))) * config.hidden_size
    return count_parameters(config) - tables


def count_macs(config: ModelConfig) -> int:
    """Count the multiply-adds of one forward pass of one example."""
    return masked_macs(config, mask_ratio=0.0)


def masked_macs(config: ModelConfig, mask_ratio: float) -> int:
    """Count the multiply-adds of one forward pass of one example in masked training."""
    return _outside_blocks(config) + sum(_block_macs(config, length) for length in _block_lengths(config, mask_ratio))


def tail_macs(config: ModelConfig) -> int:
    """Count the multiply-adds of one forward pass of the last level alone (`model.trunk_drop.TailOnly`)."""
    blocks = sum(_block_macs(config, length) for length in _block_lengths(config, 0.0)[-config.depths[-1] :])
    return _ends_macs(config) + _embedding_macs(config, len(config.depths) - 1) + blocks


def training_flops(config: ModelConfig, mask_ratio: float = 0.0) -> int:
    """Count the floating-point operations of training on one example: 2 per multiply-add, three forward passes' worth.

    Operations that remat repeats are not included: see `recomputed_macs`.
    """
    return 6 * masked_macs(config, mask_ratio)


def recomputed_macs(config: ModelConfig, mask_ratio: float = 0.0) -> int:
    """Count the multiply-adds per example that `config.remat` computes twice.

    "full" repeats the whole block, "dots" the products with a batch dimension, which are the two of attention.
    """
    modulation = 6 * config.hidden_size**2 if config.modulation == "per_block" else 0
    repeated = {
        "none": lambda length: 0,
        "dots": lambda length: _attention_macs(config, length),
        "full": lambda length: _block_macs(config, length) + modulation,
    }
    return sum(repeated[config.remat](length) for length in _block_lengths(config, mask_ratio))


def paper_macs(config: ModelConfig) -> int:
    """Count the "FLOPs" of the paper's tables.

    The paper does not define them; this definition is inferred from its figures. Linear maps count multiply-adds at
    their true length, both products of attention count as at 256 tokens in every block, and LayerNorm and GELU count
    one operation per output element, as profilers of PyTorch modules do. All twelve figures for 256 pixels then agree,
    truncated (not rounded) to the printed digits; without LayerNorm and GELU, ten agree.
    """
    width = config.hidden_size
    attention = sum(
        depth * _attention_macs(config, config.prefix_tokens + _tokens(config, level))
        for level, depth in enumerate(config.depths)
    )
    elements = _tokens(config, -1) * width  # the final norm
    for level, depth in enumerate(config.depths):
        elements += depth * (config.prefix_tokens + _tokens(config, level)) * (2 * width + config.mlp_size)
        if level > 0:
            elements += _upsampler(config, level).elements
    paper_attention = sum(config.depths) * _attention_macs(config, PAPER_TOKENS)
    return count_macs(config) - attention + paper_attention + elements


def _affine(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _tokens(config: ModelConfig, level: int) -> int:
    rows, columns = config.grid(level)
    return rows * columns


def _patch_features(config: ModelConfig, level: int) -> int:
    return config.patch_sizes[level] ** 2 * config.in_channels


def _block_lengths(config: ModelConfig, mask_ratio: float) -> list[int]:
    """Return the sequence length of every block."""
    lengths = [_tokens(config, level) for level, depth in enumerate(config.depths) for _ in range(depth)]
    if mask_ratio:
        trunk = config.depths[0] - config.decoder_depth
        lengths[:trunk] = [kept_tokens(config, mask_ratio)] * trunk
    return [config.prefix_tokens + length for length in lengths]


def _mlp_parameters(config: ModelConfig) -> int:
    return _affine(config.hidden_size, config.mlp_size) + _affine(config.mlp_size, config.hidden_size)


def _mlp_macs(config: ModelConfig) -> int:
    """Count the multiply-adds of one token."""
    return 2 * config.hidden_size * config.mlp_size


def _block_parameters(config: ModelConfig) -> int:
    width = config.hidden_size
    return _affine(width, 3 * width) + _affine(width, width) + _mlp_parameters(config)


def _attention_macs(config: ModelConfig, length: int) -> int:
    """Count the multiply-adds of both products of one block."""
    return 2 * length**2 * config.hidden_size


def _block_macs(config: ModelConfig, length: int) -> int:
    return length * (4 * config.hidden_size**2 + _mlp_macs(config)) + _attention_macs(config, length)


def _outside_blocks(config: ModelConfig) -> int:
    """Count the multiply-adds of everything but the blocks."""
    levels = range(len(config.depths))
    upsamplers = sum(_upsampler(config, level).macs for level in levels if level > 0)
    return _ends_macs(config) + upsamplers + sum(_embedding_macs(config, level) for level in levels)


def _ends_macs(config: ModelConfig) -> int:
    """Count the multiply-adds of the conditioning on time, and of the final layer."""
    width = config.hidden_size
    vectors = 6 if config.modulation == "shared" else 6 * sum(config.depths) + 2
    guidance = GUIDANCE_FEATURES * width if config.guidance_max > 1 else 0
    final = _tokens(config, -1) * width * _patch_features(config, -1)
    return _time_macs(config) + guidance + vectors * width * width + final


def _embedding_macs(config: ModelConfig, level: int) -> int:
    """Count the multiply-adds of a level's patch embedding, with its skip."""
    width, image = config.hidden_size, _tokens(config, level)
    patches = image * _patch_features(config, level) * width if level == 0 or config.skip else 0
    return patches + (image * width**2 if level > 0 and config.skip else 0)


def _time_parameters(config: ModelConfig) -> int:
    width = config.hidden_size
    if config.time_embedding == "sinusoidal":
        return _affine(TIME_FEATURES, width) + (config.sinusoidal_layers - 1) * _affine(width, width)
    channels = config.fno_width
    layer = 2 * channels**2 * config.fno_modes + _affine(channels, channels)
    return _affine(1, channels) + config.fno_layers * layer + _affine(channels, width)


def _time_macs(config: ModelConfig) -> int:
    width = config.hidden_size
    if config.time_embedding == "sinusoidal":
        return TIME_FEATURES * width + (config.sinusoidal_layers - 1) * width**2
    channels = config.fno_width
    # A complex product is four real ones.
    layer = 4 * channels**2 * config.fno_modes + FNO_GRID * channels**2
    return FNO_GRID * channels + config.fno_layers * layer + channels * width


class _Cost(NamedTuple):
    """Cost of an upsampler: parameters, multiply-adds, and output elements of its norms and GELUs."""

    parameters: int
    macs: int
    elements: int


def _upsampler(config: ModelConfig, level: int) -> _Cost:
    """Count the cost of the upsampler that leads into `level`."""
    width, (rows, columns) = config.hidden_size, config.grid(level)
    image, tokens = rows * columns, config.prefix_tokens + rows * columns
    ratio = config.patch_sizes[level - 1] // config.patch_sizes[level]
    if config.upsampler == "conv_transpose":
        # A window at the border has taps outside the image, which multiply nothing.
        outside = (TRANSPOSED_KERNEL - 1) * ratio
        taps = (TRANSPOSED_KERNEL * rows - outside) * (TRANSPOSED_KERNEL * columns - outside)
        return _Cost(_affine((TRANSPOSED_KERNEL * ratio) ** 2 * width, width), taps * width**2, 0)
    outside = CONV_KERNEL - 1
    taps = (CONV_KERNEL * rows - outside) * (CONV_KERNEL * columns - outside)
    refine = {
        "linear": _Cost(0, 0, 0),
        "linear_linear": _Cost(_affine(width, width), tokens * width**2, (image + tokens) * width),
        "linear_mlp": _Cost(
            _mlp_parameters(config), tokens * _mlp_macs(config), (image + tokens) * width + tokens * config.mlp_size
        ),
        "linear_conv": _Cost(_affine(CONV_KERNEL**2 * width, width), taps * width**2, 2 * image * width),
    }[config.upsampler]
    return _Cost(_affine(width, width * ratio**2) + refine.parameters, image * width**2 + refine.macs, refine.elements)
