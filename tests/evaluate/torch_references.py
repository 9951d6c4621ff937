"""The PyTorch networks that our extractors are compared with, with random weights."""

import numpy as np
import pytest
from flax import nnx

from mpdit_jax.evaluate.inception import Inception
from mpdit_jax.evaluate.inception_weights import published_name
from studies.beside_torch import torch_operators


def import_torchvision():
    """Import torchvision, or skip the test."""
    try:
        return torch_operators.import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))


def random_inception_state():
    """Weights of Inception under the published names, scaled so that activations keep their size."""
    random, state = np.random.default_rng(0), {}
    shapes = nnx.to_flat_state(nnx.eval_shape(lambda: nnx.state(Inception(), nnx.Param)))
    for path, leaf in shapes:
        *parts, kind = map(str, path)
        if kind == "bias" or parts == ["fc"]:
            continue
        name, (height, width, inputs, outputs) = published_name(parts), leaf.shape
        spread = np.sqrt(2 / (height * width * inputs))
        state |= {
            f"{name}.conv.weight": spread * random.standard_normal((outputs, inputs, height, width), np.float32),
            f"{name}.bn.weight": random.uniform(0.8, 1.2, outputs).astype(np.float32),
            f"{name}.bn.bias": 0.1 * random.standard_normal(outputs, np.float32),
            f"{name}.bn.running_mean": 0.1 * random.standard_normal(outputs, np.float32),
            f"{name}.bn.running_var": random.uniform(0.5, 1.5, outputs).astype(np.float32),
            f"{name}.bn.num_batches_tracked": np.zeros((), np.int64),
        }
    state["fc.weight"] = 0.02 * random.standard_normal((1008, 2048), np.float32)
    state["fc.bias"] = 0.1 * random.standard_normal(1008, np.float32)
    return state
