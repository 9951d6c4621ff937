"""Configs that are too large to run in tests: their state has the model's size, and their step traces."""

import jax
import jax.numpy as jnp
import pytest

from mpdit_jax.config import model_config, resolve
from mpdit_jax.config.flags import load_config_file
from mpdit_jax.data.latents import PAPER_MEAN, PAPER_STD, LatentSpace
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.model.parameters import abstract
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state
from mpdit_jax.train.step import build_train_step

# Epochs, and trained parameters in millions (position tables are constants).
EXPECTED = {
    "mpdit_b_256": (80, 104.6),
    "mpdit_l_256": (240, 331.4),
    "mpdit_xl_256": (240, 480.8),
    "mpdit_xl_256_one_gpu": (240, 480.8),
    "mpdit_xl_512": (120, 480.8),
    "mpdit3_xl_512": (120, 489.1),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_state_and_step(name):
    config = resolve(load_config_file(name))
    epochs, millions = EXPECTED[name]
    # The paper's recipe, of 256 pixels and of 512.
    batch_and_rate = (1024, 2e-4) if name.endswith("_256") else (256, 1e-4)
    assert (config.batch_size, config.optimizer.learning_rate) == batch_and_rate
    assert (config.ema_decay, config.label_dropout, config.data.normalization) == (0.9999, 0.1, "paper")
    adam = config.optimizer
    assert (adam.name, adam.schedule, adam.warmup_steps, adam.clip_norm) == ("adamw", "constant", 0, 0)
    assert (adam.b1, adam.b2, adam.eps, adam.weight_decay) == (0.9, 0.999, 1e-8, 0.01)
    assert (config.time.distribution, config.time.mean, config.time.std) == ("logit_normal", 0, 1)
    assert config.steps * config.batch_size / 1_281_167 == pytest.approx(epochs, rel=0.01)
    model, optimizer, mesh = model_config(config), make_optimizer(config.optimizer), make_mesh(1, 1, jax.devices()[:1])
    state = abstract_state(model, optimizer, mesh)
    assert sum(leaf.size for leaf in state.parameters.values()) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert all(leaf.dtype == jnp.float32 for leaf in state.parameters.values())
    space = LatentSpace(PAPER_MEAN, PAPER_STD, "")
    step = build_train_step(config, abstract(model)[0], optimizer, space)
    moments = jax.ShapeDtypeStruct((config.batch_size, 2, *model.input_size, 4), jnp.float16)
    batch = {"mean": moments, "std": moments, "y": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)}
    after = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
