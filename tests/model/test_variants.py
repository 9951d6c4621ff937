"""Every option of the model config: parameter and MAC counts, sharding, gradients, and refused combinations."""

from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mpdit_jax as mp
from mpdit_jax.distributed.mesh import PARAMETER_RULES, parameter_sharding
from mpdit_jax.errors import ConfigError
from mpdit_jax.model import blocks
from mpdit_jax.model.conditioning import CONDITIONS
from mpdit_jax.model.conditioning import MODULATIONS as MODULATION_PARTS
from mpdit_jax.model.config import FNO_INITS, MODULATIONS, TIME_EMBEDDINGS, UPSAMPLERS
from mpdit_jax.model.fno import FNO_INITS as FNO_INIT_PARTS
from mpdit_jax.model.mpdit import TIME_EMBEDDINGS as TIME_EMBEDDING_PARTS
from mpdit_jax.model.parameters import abstract, merge
from mpdit_jax.model.presets import preset_config
from mpdit_jax.model.upsample import UPSAMPLERS as UPSAMPLER_PARTS
from mpdit_jax.model.upsample import Upsample
from studies.fno_width import initial_sizes

SMALL = {"hidden_size": 16, "num_heads": 2, "num_classes": 3, "input_size": 8, "depths": (1, 1), "class_tokens": 2}
ONE_LEVEL = {"patch_sizes": (2,), "depths": (2,)}
VECTOR = {"condition": "vector", "class_tokens": 16}  # class_tokens must have its default, because it is not used
SINUSOIDAL = {"time_embedding": "sinusoidal"}
VARIANTS = {
    **{f"upsampler={name}": {"upsampler": name} for name in UPSAMPLERS},
    "ratio of 4": {"patch_sizes": (4, 1), "upsampler": "conv_transpose"},
    "three levels": {"patch_sizes": (4, 2, 1), "depths": (1, 1, 1), "upsampler": "linear_conv"},
    **{f"sinusoidal, {n} layers": {"time_embedding": "sinusoidal", "sinusoidal_layers": n} for n in (1, 2, 3)},
    **{f"fno, {n} layers": {"fno_layers": n, "fno_width": 8, "fno_modes": 4} for n in (2, 4)},
    "fno, scaled": {"fno_init": "scaled", "fno_width": 8},
    **{f"{m} class tokens": {"class_tokens": m} for m in (1, 32)},
    "vector, shared": VECTOR,
    "tokens, per block": {"modulation": "per_block"},
    "vector, per block": {**VECTOR, "modulation": "per_block"},
    "no skip": {"skip": False},
    "isotropic": ONE_LEVEL,
    "isotropic, decoder": {**ONE_LEVEL, "decoder_depth": 1},
}


def test_config_names_match_the_registries():
    assert set(UPSAMPLERS) == set(UPSAMPLER_PARTS)
    assert set(FNO_INITS) == set(FNO_INIT_PARTS)
    assert set(TIME_EMBEDDINGS) == set(TIME_EMBEDDING_PARTS)
    assert set(MODULATIONS) == set(MODULATION_PARTS)
    assert {"tokens", "vector"} == set(CONDITIONS)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_counted_and_laid_out(name):
    config = preset_config("mpdit_b", **{**SMALL, **VARIANTS[name]})
    shapes = abstract(config)[1]
    tables = sum(int(np.prod(config.grid(level))) * config.hidden_size for level in range(len(config.depths)))
    assert mp.count(config)[0] == tables + sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for path, leaf in shapes.items():
        spec = parameter_sharding(mesh, path, leaf.shape).spec
        # Every matrix is split along one of its dimensions.
        assert len(spec) <= len(leaf.shape), path
        assert ("fsdp" in spec) == (path.endswith(".kernel") or path == "class_embedding.table"), path


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name):
    """All weights are random, because gradients do not pass through weights that are zero."""
    config = preset_config("mpdit_b", **{**SMALL, **VARIANTS[name]})
    structure, shapes = abstract(config)
    random = np.random.default_rng(0)
    parameters = {path: random.normal(0, 0.3, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    x = random.standard_normal((2, 8, 8, 4), np.float32)

    def loss(parameters):
        velocity = merge(structure, parameters)(x, jnp.array([0.3, 0.8]), jnp.array([0, 3]))
        return jnp.square(velocity - 1).mean()

    gradients = jax.device_get(jax.jit(jax.grad(loss))(parameters))
    untouched = {path for path, leaf in gradients.items() if not np.abs(leaf).max() > 0}
    expected = {"mask_token"} if config.decoder_depth else set()  # used in masked training alone
    if config.time_embedding == "fno":
        # The mean over the grid keeps the constant mode alone, which is real, so the imaginary weights of the last
        # layer have no effect.
        expected.add(f"time_embedding.layers.{config.fno_layers - 1}.spectral.imaginary")
    assert untouched == expected
    assert all(np.isfinite(leaf).all() for leaf in gradients.values())


COUNTED = {
    "mpdit": {"depths": (2, 2)},
    "dit": {"patch_sizes": (2,), "depths": (3,), "condition": "vector", "modulation": "per_block"},
    "three levels": {"patch_sizes": (8, 4, 2), "depths": (1, 1, 2)},
    **{name: {"depths": (1, 2), "upsampler": name} for name in UPSAMPLERS if name != "linear_linear"},
    "sinusoidal": {"depths": (1, 2), "time_embedding": "sinusoidal", "sinusoidal_layers": 3},
}


@pytest.mark.parametrize("name", COUNTED)
def test_macs_are_what_xla_counts_of_the_unscanned_forward(name, monkeypatch):
    """XLA counts a scan's body once, so the loop is unrolled. The tolerance of 1 % is for norms and activations."""
    monkeypatch.setattr(blocks.jax.lax, "scan", unrolled)
    # The kernels for CPUs have a loop over heads, whose body is counted once as well.
    config = preset_config("mpdit_b", num_classes=10, platform="gpu", **COUNTED[name])
    structure, shapes = abstract(config)
    x = jax.ShapeDtypeStruct((2, 32, 32, 4), jnp.float32)
    t, y = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    lowered = jax.jit(lambda p, x, t, y: merge(structure, p)(x, t, y)).lower(shapes, x, t, y)
    assert lowered.cost_analysis()["flops"] == pytest.approx(2 * 2 * mp.count(config)[1], rel=0.01)


def unrolled(body, carry, stacked):
    for index in range(len(jax.tree.leaves(stacked)[0])):
        carry, _ = body(carry, jax.tree.map(lambda leaf, index=index: leaf[index], stacked))
    return carry, None


@pytest.mark.slow
def test_the_scaled_fno_is_the_same_size_at_every_width():
    """From width 16 to 128, the paper's output and gradient grow more than tenfold."""
    sizes = {
        init: np.array([initial_sizes(init, width, seeds=24, hidden_size=64) for width in (16, 128)])
        for init in ("paper", "scaled")
    }  # (widths, seeds, 2)
    growth = {init: found.mean(axis=1)[1] / found.mean(axis=1)[0] for init, found in sizes.items()}
    assert (np.abs(np.log(growth["scaled"])) < np.log(1.3)).all(), growth
    assert (growth["paper"] > 10).all(), growth


@pytest.mark.parametrize(("fields", "message"), [
    ({"upsampler": "linear_cnv"}, "model.upsampler='linear_cnv' .did you mean 'linear_conv'.+expected one of linear_l"),
    ({"fno_init": "xavier"}, "model.fno_init='xavier': expected one of paper, scaled"),
    ({"sinusoidal_layers": 0}, "model.sinusoidal_layers=0: expected a positive whole number"),
    ({**ONE_LEVEL, "upsampler": "linear"}, "'linear' would change nothing, since patch_sizes=.2,. is one level"),
    ({"time_embedding": "sinusoidal", "fno_init": "scaled"}, "'scaled' would change nothing, since time_embedding="),
    ({"sinusoidal_layers": 3}, "3 would change nothing, since time_embedding='fno' has no such layers: leave it at 2"),
    ({**VECTOR, "class_tokens": 3}, "3 would change nothing, since condition='vector' has no class tokens: leave it"),
    ({**SINUSOIDAL, "fno_width": 64}, "model.fno_width=64 would change nothing, since time_embedding='sinusoidal' has"),
    ({**SINUSOIDAL, "fno_modes": 8}, "model.fno_modes=8 would change nothing"),
    ({**SINUSOIDAL, "fno_layers": 5}, "model.fno_layers=5 would change nothing"),
    ({**ONE_LEVEL, "skip": False}, "model.skip=False would change nothing, since patch_sizes=.2,. is one level"),
    ({"decoder_depth": 1}, "random masking is for isotropic models, of one level"),
    ({**ONE_LEVEL, "decoder_depth": 2}, "leaves no block of 2 to the trunk"),
    ({**ONE_LEVEL, "decoder_depth": -1}, "decoder_depth=-1: expected a whole number, 0 or more"),
])  # fmt: skip
def test_impossible_combinations_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        preset_config("mpdit_b", **{**SMALL, **fields})


@pytest.mark.parametrize(("fields", "name"), [
    ({"upsampler": "linear_mlp"}, "model.upsampler='linear_mlp'"),
    ({"fno_init": "scaled"}, "model.fno_init='scaled'"),
    ({"time_embedding": "sinusoidal", "sinusoidal_layers": 1}, "model.sinusoidal_layers=1"),
    ({**ONE_LEVEL, "decoder_depth": 1}, "model.decoder_depth=1"),
])  # fmt: skip
def test_models_without_published_names_are_refused(fields, name):
    model = nnx.eval_shape(lambda: mp.create_model("mpdit_b", **{**SMALL, **fields}))
    with pytest.raises(ConfigError, match=f"{name} has no published PyTorch names"):
        mp.to_torch(model)


def test_a_linear_upsampler_is_a_transposed_convolution_without_overlap():
    """A transposed convolution with kernel r is a linear map and pixel shuffle, as upsample.py says."""
    config = preset_config("mpdit_b", **{**SMALL, "upsampler": "linear"})
    upsample = Upsample(2, config.grid(0), config, nnx.Rngs(params=0))
    tokens = np.random.default_rng(0).standard_normal((1, 2 + 4, 16), np.float32)
    found = upsample(jnp.asarray(tokens))
    kernel = np.asarray(upsample.expand.linear.kernel[...]).reshape(16, 16, 2, 2)  # (in, out, row, column)
    expected = np.einsum("hwi,iorc->hrwco", tokens[0, 2:].reshape(2, 2, 16), kernel).reshape(16, 16)
    np.testing.assert_allclose(found[0, 2:], expected, atol=1e-5)
    np.testing.assert_array_equal(found[0, :2], tokens[0, :2])
    assert config.grid(1) == (4, 4)


@pytest.mark.slow
def test_every_sharding_rule_matches_a_parameter():
    """Each sharding rule is the first match of some parameter of some variant."""
    configs = [preset_config("mpdit_b", **{**SMALL, **fields}) for fields in VARIANTS.values()]
    paths = {path for config in configs for path in abstract(config)[1]}
    used = {next(pattern for pattern, _ in PARAMETER_RULES if fnmatchcase(path, pattern)) for path in paths}
    assert used == {pattern for pattern, _ in PARAMETER_RULES}
