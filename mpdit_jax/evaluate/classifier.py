"""A small classifier of one data set, whose last hidden layer serves as features where no published network fits.

Its file is a safetensors of the weights, with the architecture as JSON in the metadata.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from mpdit_jax.errors import WeightsError
from mpdit_jax.evaluate.layers import Conv, assign
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.io.paths import expand

_KEY, _FORMAT = "mpdit_jax", "classifier 1"
_SMALLEST = 4  # pixels a side to which the images are halved


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Architecture of a classifier: shape of the images, classes and widths."""

    height: int
    width: int
    channels: int
    num_classes: int
    base_channels: int = 16
    features: int = 64


class Classifier(nnx.Module):
    """Images (B, height, width, channels) in [-1, 1] to features (B, features) and logits (B, num_classes)."""

    def __init__(self, config: ClassifierConfig):
        self.config = config
        self.stem = Conv(config.channels, config.base_channels, 3)
        downs, sides, channels = [], (config.height, config.width), config.base_channels
        while max(sides) > _SMALLEST:
            wider = min(2 * channels, 128)
            downs.append(Conv(channels, wider, 3, stride=2))
            sides, channels = ((sides[0] + 1) // 2, (sides[1] + 1) // 2), wider
        self.downs = nnx.List(downs)
        self.hidden = Conv(sides[0] * sides[1] * channels, config.features)
        self.head = Conv(config.features, config.num_classes)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return features and logits."""
        x = nnx.relu(self.stem(x))
        for down in self.downs:
            x = nnx.relu(down(x))
        features = nnx.relu(_linear(self.hidden, x.reshape(len(x), -1)))
        return features, _linear(self.head, features)


def initialize(config: ClassifierConfig, seed: int) -> Classifier:
    """Build a classifier with He-normal kernels."""
    model = Classifier(config)
    state = nnx.state(model, nnx.Param)
    key = jax.random.key(seed)
    for index, (path, leaf) in enumerate(sorted(nnx.to_flat_state(state), key=lambda item: str(item[0]))):
        if path[-1] == "kernel":
            leaf[...] = nnx.initializers.he_normal()(jax.random.fold_in(key, index), leaf[...].shape)
    nnx.update(model, state)
    return model


def save_classifier(path: str | Path, model: Classifier) -> None:
    """Write weights and architecture into one file; raises InputError if they cannot be written."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {".".join(map(str, name)): np.asarray(leaf[...]) for name, leaf in flat}
    # One entry, since safetensors does not keep the order of several.
    metadata = {_KEY: json.dumps({"format": _FORMAT, **dataclasses.asdict(model.config)}, sort_keys=True)}
    with atomic_write(path) as file:
        file.write(safetensors.numpy.save(arrays, metadata=metadata))


def load_classifier(path: str | Path) -> Classifier:
    """Read a file of `save_classifier`; raises WeightsError for a missing, damaged or foreign file."""
    path = expand(path)  # neither the shell nor the parser expands a path after `classifier:`
    if not path.is_file():
        raise WeightsError(
            f"classifier {path}: no such file; train one with `python -m mpdit_jax.train_classifier --data=digits "
            f"--out={path}`."
        )
    try:
        with safetensors.safe_open(path, "numpy") as file:
            fields = parse_json((file.metadata() or {}).get(_KEY, "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if fields.pop("format", "") != _FORMAT:
            raise WeightsError(f"{path} is not a classifier that mpdit_jax.train_classifier has written.")
        if not all(isinstance(value, int) and 0 < value < 2**20 for value in fields.values()):
            raise ValueError(f"config {fields}")
        config = ClassifierConfig(**fields)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} is not a readable classifier ({error}): train it again.") from error
    # Check sizes before anything is allocated: damaged metadata may ask for any amount of memory.
    shapes = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: Classifier(config)), nnx.Param))
    expected, found = sum(math.prod(leaf.shape) for leaf in shapes), sum(array.size for array in arrays.values())
    if expected != found:
        raise WeightsError(f"{path} holds {found:,} numbers and its architecture has {expected:,}: train it again.")
    model = Classifier(config)
    assign(model, arrays, str(path))
    return model


def _linear(layer: Conv, x: jax.Array) -> jax.Array:
    return jnp.matmul(x, layer.kernel[0, 0], precision=jax.lax.Precision.HIGHEST) + layer.bias[None]
