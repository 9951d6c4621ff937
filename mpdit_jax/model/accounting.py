"""What a model costs: parameters and multiply-adds, read off the config alone."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from mpdit_jax.errors import InputError
from mpdit_jax.model.config import FNO_GRID, ModelConfig
from mpdit_jax.model.embeddings import TIME_FEATURES
from mpdit_jax.model.masking import kept_tokens
from mpdit_jax.model.upsample import CONV_KERNEL, TRANSPOSED_KERNEL

PAPER_TOKENS = 256  # at which the paper counts the attention of every block


@runtime_checkable
class HasConfig(Protocol):
    """A model, or what `mpdit_jax.as_velocity` makes of one."""

    @property
    def config(self) -> ModelConfig:
        """What it was made of."""


def count(model: HasConfig | ModelConfig) -> tuple[int, int]:
    """Parameters and multiply-adds of a model.

    Returns:
        params: parameters as PyTorch counts them: the frozen position table of every level included.
        macs: true multiply-adds of one forward pass of one example, attention (both products, at the length each block
            really sees) included; norms, activations and FFTs are not multiply-adds of a matrix product and count zero.

    Raises:
        InputError: neither a model nor a config of one.
    """
    config = model.config if isinstance(model, HasConfig) else model
    if not isinstance(config, ModelConfig):
        raise InputError(f"model={type(model).__name__}: expected a model or a ModelConfig.")
    return count_parameters(config), count_macs(config)


def count_parameters(config: ModelConfig) -> int:
    """Trained parameters, plus the frozen position tables that PyTorch keeps as parameters."""
    width = config.hidden_size
    own = sum(config.depths) * _affine(width, 6 * width) + _affine(width, 2 * width)
    total = _time_parameters(config) + (_affine(width, 6 * width) if config.modulation == "shared" else own)
    total += (config.num_classes + 1) * (config.class_tokens if config.condition == "tokens" else 1) * width
    total += width if config.decoder_depth else 0
    for level, depth in enumerate(config.depths):
        total += depth * _block_parameters(config) + _tokens(config, level) * width
        if level == 0 or config.skip:
            total += _affine(_patch_features(config, level), width)
        if level > 0:
            total += _UPSAMPLER_PARAMETERS[config.upsampler](config, level)
        if level > 0 and config.skip:
            total += _affine(width, width)
    return total + _affine(width, _patch_features(config, -1))


def count_trained(config: ModelConfig) -> int:
    """Parameters that training moves: without the position tables."""
    tables = sum(_tokens(config, level) for level in range(len(config.depths))) * config.hidden_size
    return count_parameters(config) - tables


def count_macs(config: ModelConfig) -> int:
    """Multiply-adds of every matrix product of one forward pass of one example."""
    return masked_macs(config, mask_ratio=0.0)


def masked_macs(config: ModelConfig, mask_ratio: float) -> int:
    """Multiply-adds of one forward pass of one example in training with tokens hidden from the trunk."""
    return _outside_blocks(config) + sum(_block_macs(config, length) for length in _block_lengths(config, mask_ratio))


def training_flops(config: ModelConfig, mask_ratio: float = 0.0) -> int:
    """Floating-point operations of training on one example: 2 a multiply-add, one forward pass and two backward.

    What remat computes again is not among them: see `recomputed_macs`.
    """
    return 6 * masked_macs(config, mask_ratio)


def recomputed_macs(config: ModelConfig, mask_ratio: float = 0.0) -> int:
    """Multiply-adds that `config.remat` does a second time for one example: of the blocks all (full), of their
    products without a batch dimension none (dots), which leaves attention's two.
    """
    modulation = 6 * config.hidden_size**2 if config.modulation == "per_block" else 0
    again = {
        "none": lambda length: 0,
        "dots": lambda length: _attention_macs(config, length),
        "full": lambda length: _block_macs(config, length) + modulation,
    }
    return sum(again[config.remat](length) for length in _block_lengths(config, mask_ratio))


def _block_lengths(config: ModelConfig, mask_ratio: float) -> list[int]:
    """Tokens that each block sees."""
    lengths = [_tokens(config, level) for level, depth in enumerate(config.depths) for _ in range(depth)]
    if mask_ratio:
        trunk = config.depths[0] - config.decoder_depth
        lengths[:trunk] = [kept_tokens(config, mask_ratio)] * trunk
    return [config.prefix_tokens + length for length in lengths]


def paper_macs(config: ModelConfig) -> int:
    """What the paper prints as FLOPs.

    The paper does not say how it counts; this is read off its figures. Multiply-adds of linear maps are counted at the
    lengths they have, and the two products of attention in every block as of 256 tokens, whatever it sees. One
    operation for each element that a LayerNorm or GELU puts out, as counters do that hook PyTorch's modules, makes all
    of the twelve figures the paper gives at 256 pixels come out, cut (not rounded) behind the last digit it prints;
    without these two, ten do.
    """
    width = config.hidden_size
    blocks = sum(config.depths)
    attention = sum(
        depth * _attention_macs(config, config.prefix_tokens + _tokens(config, level))
        for level, depth in enumerate(config.depths)
    )
    elements = _tokens(config, -1) * width  # the final norm
    for level, depth in enumerate(config.depths):
        elements += depth * _refined_tokens(config, level) * (2 * width + config.mlp_size)
        if level > 0:
            elements += _UPSAMPLER_ELEMENTS[config.upsampler](config, level)
    return count_macs(config) - attention + blocks * _attention_macs(config, PAPER_TOKENS) + elements


def _affine(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _tokens(config: ModelConfig, level: int) -> int:
    rows, columns = config.grid(level)
    return rows * columns


def _ratio(config: ModelConfig, level: int) -> int:
    return config.patch_sizes[level - 1] // config.patch_sizes[level]


def _patch_features(config: ModelConfig, level: int) -> int:
    return config.patch_sizes[level] ** 2 * config.in_channels


def _mlp_parameters(config: ModelConfig) -> int:
    return _affine(config.hidden_size, config.mlp_size) + _affine(config.mlp_size, config.hidden_size)


def _mlp_macs(config: ModelConfig) -> int:
    """Of one token."""
    return 2 * config.hidden_size * config.mlp_size


def _block_parameters(config: ModelConfig) -> int:
    width = config.hidden_size
    return _affine(width, 3 * width) + _affine(width, width) + _mlp_parameters(config)


def _attention_macs(config: ModelConfig, length: int) -> int:
    """Of both products of one block."""
    return 2 * length**2 * config.hidden_size


def _block_macs(config: ModelConfig, length: int) -> int:
    return length * (4 * config.hidden_size**2 + _mlp_macs(config)) + _attention_macs(config, length)


def _outside_blocks(config: ModelConfig) -> int:
    width = config.hidden_size
    vectors = 6 if config.modulation == "shared" else 6 * sum(config.depths) + 2
    total = _time_macs(config) + vectors * width * width
    for level in range(len(config.depths)):
        image = _tokens(config, level)
        if level == 0 or config.skip:
            total += image * _patch_features(config, level) * width
        if level > 0:
            total += _UPSAMPLER_MACS[config.upsampler](config, level)
        if level > 0 and config.skip:
            total += image * width**2
    return total + _tokens(config, -1) * width * _patch_features(config, -1)


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


_Count = Callable[[ModelConfig, int], int]  # of the upsampler that enters a level


def _expand_parameters(config: ModelConfig, level: int) -> int:
    return _affine(config.hidden_size, config.hidden_size * _ratio(config, level) ** 2)


def _expand_macs(config: ModelConfig, level: int) -> int:
    return _tokens(config, level) * config.hidden_size**2


def _refined_tokens(config: ModelConfig, level: int) -> int:
    return config.prefix_tokens + _tokens(config, level)


def _convolution_parameters(config: ModelConfig, side: int) -> int:
    return _affine(side**2 * config.hidden_size, config.hidden_size)


def _convolution_macs(config: ModelConfig, level: int) -> int:
    """Of the refining convolution, without the products with what is padded."""
    rows, columns = config.grid(level)
    lost = CONV_KERNEL - 1
    return (CONV_KERNEL * rows - lost) * (CONV_KERNEL * columns - lost) * config.hidden_size**2


def _transposed_macs(config: ModelConfig, level: int) -> int:
    """Of the transposed convolution, without what falls outside the image."""
    rows, columns = config.grid(level)
    lost = (TRANSPOSED_KERNEL - 1) * _ratio(config, level)
    taps = [TRANSPOSED_KERNEL * side - lost for side in (rows, columns)]
    return taps[0] * taps[1] * config.hidden_size**2


_UPSAMPLER_PARAMETERS: dict[str, _Count] = {
    "linear_linear": lambda c, level: _expand_parameters(c, level) + _affine(c.hidden_size, c.hidden_size),
    "linear": _expand_parameters,
    "linear_mlp": lambda c, level: _expand_parameters(c, level) + _mlp_parameters(c),
    "linear_conv": lambda c, level: _expand_parameters(c, level) + _convolution_parameters(c, CONV_KERNEL),
    "conv_transpose": lambda c, level: _convolution_parameters(c, TRANSPOSED_KERNEL * _ratio(c, level)),
}
_UPSAMPLER_ELEMENTS: dict[str, _Count] = {
    "linear_linear": lambda c, level: (_tokens(c, level) + _refined_tokens(c, level)) * c.hidden_size,
    "linear": lambda c, level: 0,
    "linear_mlp": lambda c, level: (
        (_tokens(c, level) + _refined_tokens(c, level)) * c.hidden_size + _refined_tokens(c, level) * c.mlp_size
    ),
    "linear_conv": lambda c, level: 2 * _tokens(c, level) * c.hidden_size,
    "conv_transpose": lambda c, level: 0,
}
_UPSAMPLER_MACS: dict[str, _Count] = {
    "linear_linear": lambda c, level: _expand_macs(c, level) + _refined_tokens(c, level) * c.hidden_size**2,
    "linear": _expand_macs,
    "linear_mlp": lambda c, level: _expand_macs(c, level) + _refined_tokens(c, level) * _mlp_macs(c),
    "linear_conv": lambda c, level: _expand_macs(c, level) + _convolution_macs(c, level),
    "conv_transpose": _transposed_macs,
}
