"""Runs that were never trained, with a checkpoint of random weights, and commands on them."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.tiny import environment

FEW = ["--steps=2", "--batch_size=4"]


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """Return a workdir like that of configs/digits.py, with a smaller model."""
    return make_workdir(tmp_path_factory.mktemp("runs") / "digits")


def make_workdir(path, in_channels=1, step=1, label_dropout=0.1):
    from mpdit_jax.checkpoint.manager import Checkpoints
    from mpdit_jax.checkpoint.workdir import lock_workdir
    from mpdit_jax.config import base_config, model_config, resolve
    from mpdit_jax.model.parameters import abstract

    config = base_config()
    config.label_dropout = label_dropout
    config.model.update(
        patch_sizes=(2, 1),
        depths=(1, 1),
        hidden_size=16,
        num_heads=2,
        input_size=(8, 8),
        in_channels=in_channels,
        num_classes=10,
        class_tokens=2,
        time_embedding="sinusoidal",
    )
    resolved = resolve(config)
    random = np.random.default_rng(step - 1)
    _, shapes = abstract(model_config(resolved))
    weights = {
        name: jax.numpy.asarray(0.1 * random.standard_normal(leaf.shape, np.float32)) for name, leaf in shapes.items()
    }
    with lock_workdir(path, resolved), Checkpoints(path, keep=1) as checkpoints:
        checkpoints.save(step, {"parameters": weights, "ema_parameters": weights})
    return path


def start(*arguments, devices=1):
    """Start a process whose output can be read while it runs."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_npz(path):
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def run(workdir, *arguments):
    """Run the command with few steps in this process."""
    from mpdit_jax.sample.__main__ import main

    return main([f"--workdir={workdir}", *FEW, *map(str, arguments)])
