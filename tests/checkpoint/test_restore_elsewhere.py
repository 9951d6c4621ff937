"""Other numbers of devices and processes read a checkpoint of eight devices to the same bits."""

import hashlib
import json
import subprocess
import sys

import pytest

from tests.tiny import TWO_LEVELS, environment, free_port, run, saved_arrays, train_arguments

STEPS = 4
READ = """
import hashlib, json, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from pathlib import Path

workdir, fsdp, address, count, index = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:])
if count > 1:
    jax.distributed.initialize(address, count, index)
from mpdit_jax.checkpoint.manager import Checkpoints
from mpdit_jax.checkpoint.load import load_config
from mpdit_jax.config import model_config
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state, to_items

config, mesh = load_config(workdir), make_mesh(fsdp=fsdp)
target = abstract_state(model_config(config), make_optimizer(config.optimizer), mesh)
with Checkpoints(workdir, keep=3) as checkpoints:
    items = checkpoints.restore_newest(to_items(target)).items
held = [leaf.sharding.num_devices for leaf in jax.tree.leaves(items)]
arrays = multihost_utils.process_allgather(items, tiled=True) if count > 1 else jax.device_get(items)
digests = {
    f"{item}{jax.tree_util.keystr(path)}": hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    for item, tree in arrays.items()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
}
print(json.dumps({"devices": min(held), "digests": digests}))
"""


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("eight") / "run"
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=8"]
    status, _, stderr = run("train", train_arguments(workdir, *mesh, *TWO_LEVELS, f"--config.steps={STEPS}"), devices=8)
    assert status == 0, stderr
    arrays = saved_arrays(workdir, STEPS)
    return workdir, {path: hashlib.sha256(array.tobytes()).hexdigest() for path, array in arrays.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "fsdp"), [(1, 1, 1), (1, 4, 2), (2, 2, 4), (4, 1, 2)])
def test_the_same_bits_everywhere(eight_devices, processes, devices, fsdp):
    workdir, expected = eight_devices
    address = f"localhost:{free_port()}"
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READ, str(workdir), str(fsdp), address, str(processes), str(index)],
            env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(processes)
    ]  # fmt: skip
    for reader in readers:
        stdout, stderr = reader.communicate(timeout=300)
        assert reader.returncode == 0, stderr
        found = json.loads(stdout.splitlines()[-1])
        assert found["devices"] == processes * devices
        assert by_name(found["digests"]) == by_name(expected)
        # Read without our code, the optimizer's named tuples are plain dicts: the same arrays under other names.
        assert sorted(found["digests"].values()) == sorted(expected.values())


def by_name(digests):
    return {path: digest for path, digest in digests.items() if not path.startswith("optimizer")}
