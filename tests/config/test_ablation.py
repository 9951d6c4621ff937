"""configs/ablation.py: every row of the paper's tables has a config with the row's model, and its step traces."""

import re
import runpy
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

from mpdit_jax import tables
from mpdit_jax.config import flags, model_config, resolve
from mpdit_jax.config.ablation import ROWS, list_rows
from mpdit_jax.config.flags import load_config_file, shipped_configs
from mpdit_jax.data.latents import PAPER_MEAN, PAPER_STD, LatentSpace
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import ConfigError
from mpdit_jax.model.parameters import abstract
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state
from mpdit_jax.train.step import build_train_step
from tests.tiny import ROOT

ELSEWHERE = {"mpdit_xl_512", "mpdit3_xl_512"}  # files of their own
TRACED = set()  # several rows are the base


def line_of(name):
    """Return the list's line on a row."""
    (line,) = re.findall(rf"^  {name} +(.*)$", list_rows(), re.MULTILINE)
    return line


def test_every_row_has_a_config():
    assert set(shipped_configs()) >= ELSEWHERE
    listed = re.findall(r"^  (\w+)  ", list_rows(), re.MULTILINE)
    assert set(listed) - {"python"} == set(ROWS) - ELSEWHERE


@pytest.mark.parametrize("name", sorted(set(ROWS) - ELSEWHERE))
def test_model_and_step(name):
    config, row = resolve(load_config_file(f"{ROOT / 'configs/ablation.py'}:{name}")), ROWS[name]
    model = model_config(config)
    assert model == row.model.replace(dtype="bfloat16")
    assert config.mask_ratio == row.mask_ratio
    assert (config.steps, config.batch_size, config.optimizer.learning_rate) == (100_000, 1024, 2e-4)
    line = line_of(name)
    for printed in (row.params and f"{row.params} M parameters", row.gmacs and f"{row.gmacs} GFLOPs", row.note):
        assert printed in line
    assert (f"FID {row.fid}" in line) == bool(row.fid)
    assert all(f"{field}={value}" in line for field, value in row.fields.items())
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


def test_a_name_is_needed_and_the_nearest_is_named():
    for value in ("ablation", "configs/ablation.py", "ablation:"):
        with pytest.raises(ConfigError, match=r"one of dit_b_2, .* dit_xl_2_masked_75; `python") as refused:
            load_config_file(value)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"no row 'time_liner_2' \(did you mean 'time_linear_2'\?\)"):
        load_config_file("ablation:time_liner_2")


@pytest.mark.parametrize("old", ["configs/ablations/time_linear_2.py", "/clone/configs/ablations/time_linear_2.py"])
def test_a_file_of_before_is_found_under_its_new_name(old, capsys):
    assert load_config_file(old) == load_config_file("ablation:time_linear_2")
    assert capsys.readouterr().err == f"--config={old} is written --config=ablation:time_linear_2 now\n"


def test_the_file_and_the_tables_list_the_rows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--list"])
    runpy.run_path(str(ROOT / "configs/ablation.py"), run_name="__main__")
    assert tables.main(["--format=list"]) == 0
    assert capsys.readouterr().out == f"{list_rows()}\n" * 2
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--lst"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "configs/ablation.py"), run_name="__main__")
    assert done.value.code == 2


def test_a_wheel_has_the_rows(tmp_path, monkeypatch):
    """A wheel holds the configs inside the package, and there is no checkout around it."""
    shutil.copytree(ROOT / "configs", tmp_path / "mpdit_jax/configs")
    monkeypatch.setattr(flags, "__file__", str(tmp_path / "mpdit_jax/config/flags.py"))
    monkeypatch.chdir(tmp_path)
    assert shipped_configs()["ablation"] == str(tmp_path / "mpdit_jax/configs/ablation.py")
    assert load_config_file("ablation:mpdit_b_k4").model.depths == (8, 4)
