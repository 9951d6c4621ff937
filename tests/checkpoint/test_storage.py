"""Checkpoints in folders of unusual names, and saves that cannot be read again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpdit_jax.checkpoint.manager import Checkpoints
from mpdit_jax.checkpoint.workdir import lock_workdir
from mpdit_jax.config import base_config
from mpdit_jax.config.base import resolve
from mpdit_jax.distributed.mesh import make_mesh, replicated
from mpdit_jax.errors import CheckpointError, InputError
from mpdit_jax.io.storage import Storage

TREES = {"arrays": {"a": jnp.arange(4.0), "b": jnp.ones((2, 3))}, "progress": {"step": jnp.asarray(1)}}


@pytest.mark.parametrize("name", ["exp[lr=1e-3]", "a*b?/run", "a**b", "[!x]/run"])
def test_a_workdir_whose_name_looks_like_a_pattern(tmp_path, name, caplog):
    """Orbax would not find what it wrote, and warns "Skipping merge of OCDBT checkpoints"."""
    (tmp_path / "exp1").mkdir()  # a folder that the first name would match as a pattern
    with Checkpoints(tmp_path / name, keep=2) as checkpoints:
        checkpoints.save(1, TREES)
    assert not [record for record in caplog.records if "merge" in record.getMessage()]
    everywhere = replicated(make_mesh())
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), TREES)
    with Checkpoints(tmp_path / name, keep=2) as checkpoints:
        found = checkpoints.restore_newest(target)
    assert (found.step, found.notes) == (1, [])
    jax.tree.map(np.testing.assert_array_equal, found.items, TREES)


def test_a_backslash_in_the_path_is_refused_before_anything_is_written(tmp_path):
    workdir = tmp_path / "back\\slash" / "run"
    with pytest.raises(InputError, match=r"back\\slash/run: checkpoints cannot lie below .* a backslash"):
        lock_workdir(workdir, resolve(base_config())).__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("lost", "final"), [("progress", False), ("progress", True), ("average", True)])
def test_a_save_that_cannot_be_read_again_is_an_error(tmp_path, monkeypatch, lost, final):
    """The last save is read back before a run says that it is done; here its arrays vanish after the save."""
    wait = Storage.wait

    def wait_and_lose(self):
        wait(self)
        for path in (tmp_path / "checkpoints/1" / lost).glob("*ocdbt"):
            path.unlink()

    monkeypatch.setattr(Storage, "wait", wait_and_lose)
    sentence = r"checkpoints/1 cannot be read .* though nothing failed when it was written"
    with pytest.raises(CheckpointError, match=sentence), Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, {**TREES, "average": {"a": jnp.arange(3.0)}}, final=final)
