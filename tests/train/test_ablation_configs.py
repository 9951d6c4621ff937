"""configs/ablations/: every row of the paper's tables is a file, its model the row's, and its step traces."""

import ast
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mpdit_jax.config import model_config, resolve
from mpdit_jax.config.paper import ROWS
from mpdit_jax.data.latents import PAPER_MEAN, PAPER_STD, LatentSpace
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.model.parameters import abstract
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state
from mpdit_jax.train.step import build_train_step

FILES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "configs/ablations").glob("*.py"))}
ELSEWHERE = {"mpdit_xl_512", "mpdit3_xl_512"}  # in configs/
TRACED = set()  # several rows are the base


def test_every_row_is_a_file():
    assert set(FILES) == set(ROWS) - ELSEWHERE


@pytest.mark.parametrize("name", FILES)
def test_model_and_step(name):
    spec = importlib.util.spec_from_file_location(name, FILES[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config, row = resolve(module.get_config()), ROWS[name]
    model = model_config(config)
    assert model == row.model.replace(dtype="bfloat16")
    assert config.mask_ratio == row.mask_ratio
    assert (config.steps, config.batch_size, config.optimizer.learning_rate) == (100_000, 1024, 2e-4)
    document = ast.get_docstring(ast.parse(FILES[name].read_text()))
    assert f"--config=configs/ablations/{name}.py" in document
    assert (not row.fid) or f"{row.fid}" in document
    assert ("The paper reports" in document or "The paper quotes" in document) == (
        bool(row.fid) or name == "time_fno_width_128"
    )
    if (model, config.mask_ratio) in TRACED:
        return
    TRACED.add((model, config.mask_ratio))
    optimizer, mesh = make_optimizer(config.optimizer), make_mesh(1, 1, jax.devices()[:1])
    state = abstract_state(model, optimizer, mesh)
    step = build_train_step(config, abstract(model)[0], optimizer, LatentSpace(PAPER_MEAN, PAPER_STD, ""))
    moments = jax.ShapeDtypeStruct((config.batch_size, 2, 32, 32, 4), jnp.float16)
    batch = {"mean": moments, "std": moments, "y": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)}
    after = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
