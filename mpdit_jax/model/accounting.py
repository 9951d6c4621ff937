"""What a model costs: parameters and multiply-adds, read off the config alone."""

from mpdit_jax.model.config import FNO_GRID, ModelConfig
from mpdit_jax.model.embeddings import TIME_FEATURES
from mpdit_jax.model.mpdit import MPDiT


def count(model: MPDiT | ModelConfig) -> tuple[int, int]:
    """Parameters and multiply-adds of a model.

    Returns:
        params: parameters as PyTorch counts them: the frozen position table of every level included.
        macs: true multiply-adds of one forward pass of one example, attention (both products, at the length each block
            really sees) included; norms, activations and FFTs are not multiply-adds of a matrix product and count zero.
    """
    config = model if isinstance(model, ModelConfig) else model.config
    return count_parameters(config), count_macs(config)


def count_parameters(config: ModelConfig) -> int:
    """Trained parameters, plus the frozen position tables that PyTorch keeps as parameters."""
    width = config.hidden_size
    own = sum(config.depths) * _affine(width, 6 * width) + _affine(width, 2 * width)
    total = _time_parameters(config) + (_affine(width, 6 * width) if config.modulation == "shared" else own)
    total += (config.num_classes + 1) * (config.class_tokens if config.condition == "tokens" else 1) * width
    for level, depth in enumerate(config.depths):
        total += depth * _block_parameters(config) + _tokens(config, level) * width
        if level == 0 or config.skip:
            total += _affine(_patch_features(config, level), width)
        if level > 0:
            total += _affine(width, width * _ratio(config, level) ** 2) + _affine(width, width)
        if level > 0 and config.skip:
            total += _affine(width, width)
    return total + _affine(width, _patch_features(config, -1))


def count_macs(config: ModelConfig) -> int:
    """Multiply-adds of every matrix product of one forward pass of one example."""
    width = config.hidden_size
    vectors = 6 if config.modulation == "shared" else 6 * sum(config.depths) + 2
    total = _time_macs(config) + vectors * width * width
    for level, depth in enumerate(config.depths):
        image = _tokens(config, level)
        length = config.prefix_tokens + image
        total += depth * (length * (4 * width**2 + 2 * width * config.mlp_size) + _attention_macs(config, length))
        if level == 0 or config.skip:
            total += image * _patch_features(config, level) * width
        if level > 0:
            total += _tokens(config, level - 1) * width * width * _ratio(config, level) ** 2 + length * width**2
        if level > 0 and config.skip:
            total += image * width**2
    return total + _tokens(config, -1) * width * _patch_features(config, -1)


def training_flops(config: ModelConfig) -> int:
    """Floating-point operations of training on one example: 2 a multiply-add, one forward pass and two backward.

    What remat computes again is not among them: see `recomputed_macs`.
    """
    return 6 * count_macs(config)


def recomputed_macs(config: ModelConfig) -> int:
    """Multiply-adds that `config.remat` does a second time for one example: of the blocks all (full), of their
    products without a batch dimension none (dots), which leaves attention's two.
    """
    total, width = 0, config.hidden_size
    for level, depth in enumerate(config.depths):
        length = config.prefix_tokens + _tokens(config, level)
        products = length * (4 * width**2 + 2 * width * config.mlp_size)
        block = {"none": 0, "dots": 0, "full": products + (6 * width**2 if config.modulation == "per_block" else 0)}
        attention = 0 if config.remat == "none" else _attention_macs(config, length)
        total += depth * (block[config.remat] + attention)
    return total


def _attention_macs(config: ModelConfig, length: int) -> int:
    """Both products of attention over `length` tokens."""
    return 2 * length**2 * config.hidden_size


def _affine(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _tokens(config: ModelConfig, level: int) -> int:
    rows, columns = config.grid(level)
    return rows * columns


def _ratio(config: ModelConfig, level: int) -> int:
    return config.patch_sizes[level - 1] // config.patch_sizes[level]


def _patch_features(config: ModelConfig, level: int) -> int:
    return config.patch_sizes[level] ** 2 * config.in_channels


def _block_parameters(config: ModelConfig) -> int:
    width = config.hidden_size
    attention = _affine(width, 3 * width) + _affine(width, width)
    return attention + _affine(width, config.mlp_size) + _affine(config.mlp_size, width)


def _time_parameters(config: ModelConfig) -> int:
    width = config.hidden_size
    if config.time_embedding == "sinusoidal":
        return _affine(TIME_FEATURES, width) + _affine(width, width)
    channels = config.fno_width
    layer = 2 * channels**2 * config.fno_modes + _affine(channels, channels)
    return _affine(1, channels) + config.fno_layers * layer + _affine(channels, width)


def _time_macs(config: ModelConfig) -> int:
    width = config.hidden_size
    if config.time_embedding == "sinusoidal":
        return TIME_FEATURES * width + width**2
    channels = config.fno_width
    # A complex product is four real ones.
    layer = 4 * channels**2 * config.fno_modes + FNO_GRID * channels**2
    return FNO_GRID * channels + config.fno_layers * layer + channels * width
