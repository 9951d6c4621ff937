"""The configs that no test machine can run: their state has the model's size and their step traces."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mpdit_jax.config import model_of, resolve
from mpdit_jax.data.latents import PAPER_MEAN, PAPER_STD, LatentSpace
from mpdit_jax.mesh import make_mesh
from mpdit_jax.model.parameters import abstract
from mpdit_jax.training.optimizer import make_optimizer
from mpdit_jax.training.state import abstract_state
from mpdit_jax.training.step import make_draw, make_loss, make_step

CONFIGS = Path(__file__).parents[2] / "configs"
# Epochs, and trained parameters in millions (position tables are constants).
EXPECTED = {
    "mpdit_b_256": (80, 104.6),
    "mpdit_l_256": (240, 331.4),
    "mpdit_xl_256": (240, 480.8),
    "mpdit_xl_512": (120, 480.8),
    "mpdit3_xl_512": (120, 489.1),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_state_and_step(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = resolve(module.get_config())
    epochs, millions = EXPECTED[name]
    assert config.steps * config.batch_size / 1_281_167 == pytest.approx(epochs, rel=0.01)
    model, optimizer, mesh = model_of(config), make_optimizer(config.optimizer), make_mesh(1, 1, jax.devices()[:1])
    state = abstract_state(model, optimizer, mesh)
    assert sum(leaf.size for leaf in state.parameters.values()) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert all(leaf.dtype == jnp.float32 for leaf in state.parameters.values())
    space = LatentSpace(PAPER_MEAN, PAPER_STD, "")
    step = make_step(make_draw(config, space), make_loss(abstract(model)[0]), optimizer, config.ema_decay)
    moments = jax.ShapeDtypeStruct((config.batch_size, 2, *model.input_size, 4), jnp.float16)
    batch = {"mean": moments, "std": moments, "y": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)}
    after = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
