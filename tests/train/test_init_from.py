"""What a run starts from (`config.init_from`): the config stored with the weights, and files of other projects."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpdit_jax.errors import ConfigError
from mpdit_jax.interop.native_files import save_native
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.parameters import split
from mpdit_jax.train.init_from import initialize_from
from mpdit_jax.train.state import TrainState
from tests.flow.toys import tiny_model

DIT = {"condition": "vector", "modulation": "per_block", "class_tokens": 16, "depths": (1,), "patch_sizes": (2,)}


@pytest.fixture
def start(tmp_path):
    """A function that starts a run of one model from the file of another; it returns the model and the new state."""

    def start(theirs, ours):
        stored, model = tiny_model(**theirs), tiny_model(**ours)
        save_native(tmp_path / "weights.safetensors", stored, 1)
        state = drawn(jax.tree.map(jnp.zeros_like, split(model)[1]))
        return stored, initialize_from(state, str(tmp_path / "weights.safetensors"), model.config)

    return start


def drawn(parameters):
    """A state of which only the parameters matter."""
    others = {field.name: None for field in dataclasses.fields(TrainState)}
    return TrainState(**others | {"parameters": parameters})


@pytest.mark.parametrize(("theirs", "sentence"), [
    (DIT | {"convention": "sit"}, "is of convention 'sit': expected weights of a velocity"),
    (DIT | {"convention": "dit"}, "is of convention 'dit': expected weights of a velocity"),
    (DIT | {"num_heads": 4}, r"num_heads=4 there and 2 here\. Set config\.model as there"),
    (DIT | {"mlp_ratio": 4.01}, r"mlp_ratio=4\.01 there and 4\.0 here"),
])  # fmt: skip
def test_weights_of_another_function_are_refused(start, theirs, sentence):
    with pytest.raises(ConfigError, match=r"weights\.safetensors .*" + sentence):
        start(theirs, DIT)


def test_another_time_embedding_of_the_same_shapes_is_refused(start):
    fno = {"time_embedding": "fno", "fno_width": 64}
    with pytest.raises(ConfigError, match="fno_init='paper' there and 'scaled' here"):
        start(fno, fno | {"fno_init": "scaled"})


@pytest.mark.parametrize("ours", [
    {"dtype": "bfloat16", "remat": "full", "platform": "gpu"},
    {"input_size": 16},
    {"flow_map": True},
    {"null_class": False},
])  # fmt: skip
def test_what_is_adapted_or_says_how_a_machine_computes_may_differ(start, ours):
    stored, state = start({}, ours)
    for name, array in split(stored)[1].items():
        np.testing.assert_array_equal(state.parameters[name], array, err_msg=name)


def test_every_field_is_compared_or_may_differ():
    """A new field of the model is compared until someone decides otherwise."""
    from mpdit_jax.train import init_from

    assert set(vars(ModelConfig())) > init_from._MAY_DIFFER
