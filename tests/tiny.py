"""A run small enough for many repetitions in tests, and functions that start commands as a user would."""

import atexit
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mpdit_jax.runtime import cli
from tests.forked import ROOT, Forked, can_fork

OVERRIDES = [  # one level: a start takes a fifth less; TWO_LEVELS where the model matters
    "--config.steps=8",
    "--config.batch_size=8",
    "--config.model.hidden_size=16",
    "--config.model.num_heads=2",
    "--config.model.patch_sizes=2,",
    "--config.model.depths=2,",
    "--config.log.every=3",
    "--config.checkpoint.every=4",
    "--config.sample.every=0",
    "--config.eval.every=0",
]


TWO_LEVELS = ["--config.model.patch_sizes=2,1", "--config.model.depths=2,1"]


@cache
def digits_file():
    """Write scikit-learn's digits as an .npz, since reading them from scikit-learn takes a tenth of a tiny run."""
    from mpdit_jax.data.sources import load_digits

    folder = tempfile.mkdtemp(prefix="mpdit_jax_tests_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    digits, path = load_digits(), Path(folder) / "digits.npz"
    images = digits.batch(np.arange(len(digits)))["x"]
    np.savez(path, images=np.round((images + 1) * 127.5).astype(np.uint8), labels=digits.labels)
    return path


def train_arguments(workdir, *more):
    """Return the arguments of `mpdit_jax.train` for the tiny run; later ones win."""
    data = ["--config.data.name=arrays", f"--config.data.path={digits_file()}"]
    return [f"--config={ROOT / 'configs/digits.py'}", f"--workdir={workdir}", *data, *OVERRIDES, *more]


# For runs that are compared over different numbers of devices. Devices sum in another order, and Adam divides by the
# gradient's size: with the recipe's eps of 1e-8, an entry whose true gradient is zero (the key third of qkv's bias; all
# behind a gate that has hardly left zero) moves by a learning rate's worth of rounding. Beside this eps rounding is
# small, and nothing need be left out of the comparison: the largest difference after 20 steps was 0.09 of what
# `assert_near` allows, against 140 times as much as is allowed with 1e-8.
COMPARABLE = "--config.optimizer.eps=1e-4"


def environment(devices=1):
    """Return the environment of a process with `devices` virtual CPU devices."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


# Variables of a process, with one device, that compiles as users' do, unlike the rest of the suite (tests/conftest.py).
OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": ""}


@contextmanager
def optimized():
    """Compile with optimizations in this process, though with its emitters."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def start(command, arguments, devices=1, extra=None, before="", **options):
    """Start `python -m mpdit_jax.COMMAND` as its own process, with `devices` virtual CPU devices, `extra` variables.

    `before` is Python that the process runs first. Without it, and without options of Popen, the process is forked from
    one that has imported JAX where that makes no difference (tests/forked.py).
    """
    variables = environment(devices) | (extra or {})
    if not before and not options and can_fork(variables):
        return Forked(command, arguments, variables)
    module = f"mpdit_jax.{command}"
    command_itself = f"import runpy\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return subprocess.Popen(
        [sys.executable, *(["-c", f"{before}\n{command_itself}"] if before else ["-m", module]), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        **options,
    )


def run(command, arguments, devices=1, **options):
    """Run a command to its end: (status, stdout, stderr)."""
    process = start(command, arguments, devices, **options)
    stdout, stderr = process.communicate(timeout=600)
    return process.returncode, stdout, stderr


def refusal(main, arguments, monkeypatch, capsys):
    """Run a command that refuses its input with status 1 and no output, and return its one line of error."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        cli.run(main)
    stdout, stderr = capsys.readouterr()
    assert (done.value.code, stdout) == (1, "")
    assert re.fullmatch(r"error: [^\n]*\n", stderr), stderr
    return stderr.removeprefix("error: ")


def free_port(count=2):
    """Return the first of `count` free ports in a row."""
    while True:
        with ExitStack() as held:
            first = held.enter_context(socket.socket())
            first.bind(("", 0))
            port = first.getsockname()[1]
            try:
                for other in range(port + 1, port + count):
                    held.enter_context(socket.socket()).bind(("", other))
            except (OSError, OverflowError):  # taken, or beyond the last port there is
                continue
            return port


def join_flags(port, count, index):
    """Return the flags by which process `index` of `count` finds the others."""
    return [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}"]


# On CPUs, processes exchange data through gloo, which mixes up collectives that they begin in different orders; without
# this flag a flow map's step in bfloat16 ended that way. launch/local_multiprocess.sh sets it as well.
IN_ONE_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
_JOINED = """
import argparse, os, time
import jax
from mpdit_jax.distributed.collectives import barrier
from mpdit_jax.distributed.startup import add_flags, join
from mpdit_jax.errors import InputError
from mpdit_jax.runtime import cli

def main(arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    options = parser.parse_args(arguments)
    join(options, {})
BODY
    barrier("a test")
    return 0

cli.run(main)
"""


def start_joined(body, count=2):
    """Start the processes of one job; each runs `body`, where `options` are its arguments, and waits for the others."""
    script, port = _JOINED.replace("BODY", textwrap.indent(body.strip(), "    ")), free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *join_flags(port, count, index), "--heartbeat_timeout=10"],
            env=environment() | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {IN_ONE_ORDER}"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip


def saved_arrays(workdir, step):
    """Read every array of a checkpoint, by path, without our own code."""
    import jax
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    folder, arrays = Path(workdir).resolve() / "checkpoints" / str(step), {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("parameters", "ema_parameters", "optimizer", "progress"):
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                checkpointer.metadata(folder / item).item_metadata.tree,
            )
            leaves, _ = jax.tree_util.tree_flatten_with_path(checkpointer.restore(folder / item, target))
            arrays.update({f"{item}{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves})
    return arrays


def losses(workdir):
    """Read the loss of every line of a run's log."""
    return [json.loads(line)["loss"] for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def assert_near(found, expected):
    """Assert that every parameter is within 1e-4 of its array's largest entry."""
    for path, array in expected.items():
        if path.startswith("parameters"):
            np.testing.assert_allclose(found[path], array, rtol=0, atol=1e-4 * np.abs(array).max(), err_msg=path)


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for path, array in first.items():
        assert array.dtype == second[path].dtype, path
        assert array.tobytes() == second[path].tobytes(), path


def command_main(command):
    """Return the `main` of `python -m mpdit_jax.COMMAND`, a package with `__main__.py` or one file."""
    package = importlib.util.find_spec(f"mpdit_jax.{command}").submodule_search_locations
    return importlib.import_module(f"mpdit_jax.{command}" + ".__main__" * bool(package)).main
