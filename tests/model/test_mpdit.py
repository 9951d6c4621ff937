import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpdit_jax as mp
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.model.blocks import Block
from mpdit_jax.model.conditioning import Modulation
from mpdit_jax.model.config import ModelConfig
from mpdit_jax.model.embeddings import patchify, sincos_positions, unpatchify
from mpdit_jax.model.parameters import merge, split
from mpdit_jax.model.upsample import pixel_shuffle
from tests.conftest import relative_error

SMALL = {"hidden_size": 32, "num_heads": 4, "num_classes": 10, "input_size": 8, "class_tokens": 2}


def random_model(**fields):
    """Build a model whose weights are all nonzero; the zeros of the initialization would hide mistakes."""
    structure, parameters = split(mp.create_model("mpdit_b", **{"depths": (2, 1), **SMALL, **fields}))
    keys = dict(zip(parameters, jax.random.split(jax.random.key(1), len(parameters)), strict=True))
    return merge(structure, {k: v + 0.05 * jax.random.normal(keys[k], v.shape) for k, v in parameters.items()})


def inputs(model, batch=3):
    x = jax.random.normal(jax.random.key(2), (batch, *model.input_shape))
    return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [
    {"patch_sizes": (4, 2), "depths": (2, 1)},
    {"patch_sizes": (4, 2, 1), "depths": (1, 1, 1)},
    {"patch_sizes": (4, 1), "depths": (1, 2)},
    {"patch_sizes": (2,), "depths": (2,)},
    {"input_size": (8, 16)},
    {"skip": False},
    {"time_embedding": "sinusoidal", "in_channels": 1},
])  # fmt: skip
def test_any_levels_and_sizes(fields):
    model = random_model(**fields)
    v = model(*inputs(model))
    assert v.shape == (3, *model.input_shape)
    assert v.dtype == jnp.float32
    assert np.isfinite(v).all()
    # The output depends on data, time and class.
    x, t, y = inputs(model)
    for changed in ((x + 0.1, t, y), (x, t + 0.05, y), (x, t, y + 1)):
        assert relative_error(model(*changed), v) > 1e-4


def test_a_batch_is_independent_examples():
    model = random_model()
    x, t, y = inputs(model)
    whole = model(x, t, y)
    for i in range(3):
        assert relative_error(model(x[i : i + 1], t[i : i + 1], y[i : i + 1]), whole[i : i + 1]) < 1e-5


def test_rows_and_columns_are_not_confused():
    model = random_model(input_size=(8, 16))
    x, t, y = inputs(model)
    assert relative_error(model(jnp.flip(x, 1), t, y), jnp.flip(model(x, t, y), 1)) > 1e-3  # positions break symmetry
    table = sincos_positions((2, 3), 8).reshape(2, 3, 8)
    assert np.array_equal(table[0, :, 4:], np.broadcast_to(table[0, 0, 4:], (3, 4)))  # same row: same second half
    assert np.array_equal(table[:, 0, :4], np.broadcast_to(table[0, 0, :4], (2, 4)))  # same column: same first half
    assert table[0, 2, 0] == pytest.approx(np.sin(2))
    assert table[1, 0, 4] == pytest.approx(np.sin(1))


def test_patchify_order():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(jnp.asarray(x), 2)
    assert patches.shape == (2, 6, 12)
    assert np.array_equal(patches[1, 4], x[1, 2:4, 2:4].reshape(-1))  # token (row 1, column 1)
    assert np.array_equal(unpatchify(patches, 2, (2, 3)), x)


def test_pixel_shuffle_order():
    tokens = jnp.arange(2 * 3 * 8).reshape(1, 6, 8)  # grid (2, 3), 2 channels, r = 2: index (channel, row, column)
    shuffled = pixel_shuffle(tokens, (2, 3), 2).reshape(4, 6, 2)
    assert np.array_equal(shuffled[2:4, 2:4, 1], np.arange(4 * 8 + 4, 4 * 8 + 8).reshape(2, 2))


def test_a_call_is_the_composition_of_its_parts():
    model = random_model()
    x, t, y = inputs(model)
    parts = model.velocity(x, model.modulation(t), model.class_embedding(y))
    assert np.array_equal(model(x, t, y), parts)


def test_a_label_out_of_range_is_refused_or_if_traced_gives_nan():
    model = random_model()
    x, t, _ = inputs(model)
    for outside in (model.num_classes + 1, -1, -2):
        labels = jnp.array([0, model.num_classes, outside])
        with pytest.raises(InputError, match=f"label {outside} is out of range: this model has classes 0 to"):
            model(x, t, labels)
        v = jax.jit(lambda labels: model(x, t, labels))(labels)
        assert np.isfinite(v[:2]).all()
        assert np.isnan(v[2]).all()


def test_compile_time_does_not_grow_with_depth():
    """The program of a deep model is hardly longer than that of a shallow one."""

    def program(depths):
        structure, parameters = split(random_model(depths=depths))
        arguments = inputs(random_model())
        return len(jax.jit(lambda p, *a: merge(structure, p)(*a)).lower(parameters, *arguments).as_text())

    assert program((12, 12)) < 1.02 * program((2, 2))


def test_residuals_that_a_block_stores_for_its_backward_pass():
    """They include the inputs of norms and GELU, but not their outputs."""
    config = ModelConfig(hidden_size=32, num_heads=2, num_classes=10, platform="cpu")
    structure, parameters = nnx.split(Block(config, nnx.Rngs(params=0)))
    x, modulation = jnp.ones((2, 480, 32)), Modulation(*jnp.ones((6, 2, 32)))

    def backward(*inputs):
        return jax.vjp(lambda parameters, *rest: nnx.merge(structure, parameters)(*rest), *inputs)[1]

    stored = [leaf.size / x.size for leaf in jax.tree.leaves(jax.eval_shape(backward, parameters, x, modulation))]
    # In units of x: x before attention and before the MLP, q, k, v, attention's result, both branches before their
    # gates, and the MLP's hidden features (4). Smaller arrays are weights and values per image or token.
    assert sum(size for size in stored if size >= 1) == 8 + 4


def test_modules_have_no_state_but_parameters():
    _, parameters, rest = nnx.split(mp.create_model("mpdit_b", depths=(1, 1), **SMALL), nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(parameters))


def test_wrong_shapes_are_refused():
    model = random_model()
    x, t, y = inputs(model)
    for bad in ((x[:, :4], t, y), (x, t[:2], y), (x, t, y[:, None]), (jnp.moveaxis(x, -1, 1), t, y)):
        with pytest.raises(InputError, match=r"this model takes x \(B, 8, 8, 4\)"):
            model(*bad)


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"patch_sizes": (4, 3)}, r"patch_sizes=\(4, 3\).*divide"),
    ({"patch_sizes": (2, 4)}, "coarse to fine"),
    ({"patch_sizes": (4, 4)}, "smaller"),
    ({"patch_sizes": (4, 2, 1)}, "one depth for each"),
    ({"patch_sizes": (3,), "depths": (1,)}, "multiples of 3"),
    ({"depths": (0, 1)}, "depths=.*positive"),
    ({"depths": "6,6"}, "depths='6,6'"),
    ({"hidden_size": 50, "num_heads": 7}, "not divisible by model.num_heads=7"),
    ({"hidden_size": 30, "num_heads": 5}, "not divisible by 4"),
    ({"hidden_size": 32.0}, "hidden_size=32.0"),
    ({"num_classes": 0}, "num_classes=0"),
    ({"mlp_ratio": -1}, "mlp_ratio=-1"),
    ({"mlp_ratio": "4"}, "mlp_ratio='4'"),
    ({"fno_modes": 18}, "17 Fourier modes"),
    ({"time_embedding": "sinusodal"}, "did you mean 'sinusoidal'"),
    ({"dtype": "float16"}, "float32, bfloat16"),
    ({"remat": "all"}, "none, dots, full"),
    ({"attention": "flash"}, "xla, cudnn"),
    ({"skip": 1}, "True or False"),
    ({"input_size": (8, 8, 8)}, "height, width"),
    ({"heads": 4}, "unknown model field 'heads'.*num_heads"),
])  # fmt: skip
def test_impossible_configs_are_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        mp.create_model("mpdit_b", **{**SMALL, **fields})


def test_unknown_preset():
    with pytest.raises(ConfigError, match=r"unknown preset 'mpdit_x'.*mpdit_xl"):
        mp.create_model("mpdit_x")


def test_lists_and_numbers_are_normalized():
    config = ModelConfig(patch_sizes=[4, 2], depths=[1, 2], input_size=16, mlp_ratio=4)
    assert config == ModelConfig(patch_sizes=(4, 2), depths=(1, 2), input_size=(16, 16), mlp_ratio=4.0)
    assert hash(config) == hash(config.replace())


def test_numpy_numbers_are_numbers():
    whole = {name: np.int64(value) for name, value in SMALL.items()}
    config = ModelConfig(**whole, depths=[*np.array((2, 1))])
    assert config == ModelConfig(**SMALL, depths=(2, 1))
    assert all(type(value) is int for value in (config.hidden_size, *config.depths, *config.input_size))


def test_lists_are_arrays_and_labels_whole_numbers():
    model = mp.create_model("mpdit_b", depths=(1, 1), **SMALL)
    x = np.zeros((2, 8, 8, 4), np.float32)
    assert model(x, [0.1, 0.2], [3, 4]).shape == x.shape
    with pytest.raises(InputError, match="y has dtype float32: expected labels"):
        model(x, [0.1, 0.2], [3.0, 4.0])
    with pytest.raises(InputError, match=r"t \(\), y \(2,\): this model takes"):
        model(x, 0.1, [3, 4])


@pytest.mark.parametrize("seed", [-1, 2**70, 0.5, "0", True])
def test_impossible_seeds(seed):
    with pytest.raises(ConfigError, match=r"seed=.*expected a whole number from 0"):
        mp.create_model("mpdit_b", seed=seed)
