"""A VAE's training never saves parameters that are not finite, nor writes into a folder that replaced its workdir."""

import os
import signal
import time

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from mpdit_jax.checkpoint.reader import list_steps
from mpdit_jax.errors import CheckpointError, DivergedError
from mpdit_jax.train import vae
from mpdit_jax.train_vae import main
from tests.tiny import ROOT


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "images" / "one").mkdir(parents=True)
    for index in range(8):
        Image.new("L", (8, 8), 30 * index).save(tmp_path / "images" / "one" / f"{index}.png")
    return [
        f"--config={ROOT / 'configs/vae_fashion.py'}", f"--config.data.images={tmp_path / 'images'}",
        f"--workdir={tmp_path / 'run'}", "--config.steps=6", "--config.batch_size=4", "--config.data.image_size=8",
        "--config.model.block_out_channels=8,8", "--config.model.norm_num_groups=4", "--config.log.every=100",
    ]  # fmt: skip


def disturb(monkeypatch, step, change):
    """Replace the state after a step by `change(state)`."""
    make = vae._make_update

    def made(*given):
        update = make(*given)

        def disturbed(state, x):
            state = update(state, x)
            with jax.transfer_guard("allow"):
                return change(state) if int(state.step) == step else state

        return disturbed

    monkeypatch.setattr(vae, "_make_update", made)


def broken(state):
    """Make the parameters NaN, which the loss of this step does not show."""
    return state._replace(parameters=jax.tree.map(lambda leaf: leaf * jnp.nan, state.parameters))


@pytest.mark.slow
def test_broken_parameters_are_not_saved(arguments, tmp_path, monkeypatch):
    disturb(monkeypatch, 3, broken)
    with pytest.raises(DivergedError, match="the loss or the parameters of step 3 are not finite"):
        main([*arguments, "--config.checkpoint.every=1"])
    assert list_steps(tmp_path / "run") == [1, 2]


@pytest.mark.slow
def test_broken_parameters_are_not_saved_when_asked_to_stop(arguments, tmp_path, monkeypatch):
    def stopped(state):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # a thread listens
        return broken(state)

    disturb(monkeypatch, 3, stopped)
    with pytest.raises(DivergedError, match="of step 3 are not finite"):
        main([*arguments, "--config.checkpoint.every=2"])
    assert list_steps(tmp_path / "run") == [2]


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--config.checkpoint.every=3"], []], ids=["at a checkpoint", "at the end"])
def test_a_folder_in_its_place_is_left_alone(arguments, tmp_path, monkeypatch, more):
    def replaced(state):
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        (tmp_path / "run").mkdir()
        return state

    disturb(monkeypatch, 3, replaced)
    with pytest.raises(CheckpointError, match="was deleted, moved or replaced while the training was writing to it"):
        main([*arguments, *more])
    assert not list((tmp_path / "run").iterdir())
