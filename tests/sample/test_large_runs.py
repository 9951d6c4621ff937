"""`python -m mpdit_jax.sample` survives kills, and many devices and processes share it."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from mpdit_jax.checkpoint.load import load_together
from mpdit_jax.errors import InputError, ProcessError
from mpdit_jax.sample.__main__ import main
from mpdit_jax.sample.blocks import Block, BlockFolder
from tests.sample.conftest import FEW, make_workdir, read_npz, run, start
from tests.tiny import free_port, join_flags


def test_temporaries_of_a_killed_run_are_deleted(workdir, tmp_path):
    singles = tmp_path / "single"
    singles.mkdir()
    (tmp_path / "a.npz.unfinished.old").mkdir()
    left = [
        *(tmp_path / f".{name}.0a_b3cde.tmp" for name in ("a.npz", "a.png", "a_trajectory.gif", "a_trajectory.png")),
        singles / ".000003_3.png.0a_b3cde.tmp",
    ]
    others = [
        tmp_path / ".b.npz.0a_b3cde.tmp",
        tmp_path / ".a.npz.old.0a_b3cde.tmp",
        singles / ".mine.png.0a_b3cde.tmp",
    ]
    for path in (*left, *others):
        path.touch()
    arguments = ["--labels=1", "--num_samples=1", "--grid", "--trajectory", f"--png_folder={singles}"]
    assert run(workdir, f"--out={tmp_path}/a.npz", *arguments) == 0
    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in others)
    assert not list(tmp_path.glob("*unfinished*"))


def test_blocks_without_settings_are_not_used(tmp_path, monkeypatch):
    """A kill in the middle of a removal leaves no blocks that another run would use."""
    one = Block(np.zeros((1, 1, 1, 1), np.uint8), np.zeros(1, int), np.zeros(1, int), np.ones(1, bool))
    path = tmp_path / "a.npz.unfinished"
    folder = BlockFolder(path, {"seed": 0})
    folder.write(0, one)

    def killed(found, **options):
        if Path(found).is_dir():
            (Path(found) / "settings.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mpdit_jax.io.locked_folder.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.remove()
    assert not BlockFolder(path, {"seed": 1}).has(0)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    folder.write(0, one)
    (path / "settings.json").unlink()
    with pytest.raises(
        InputError, match=r"a\.npz\.unfinished holds images and no settings\.json.*: delete that folder"
    ):
        BlockFolder(path, {"seed": 1})


def test_a_second_run_is_refused_with_the_process_that_draws(workdir, tmp_path):
    path = tmp_path / "a.npz.unfinished"
    with BlockFolder(path, {"seed": 0}):
        with pytest.raises(
            InputError, match=rf"another run is drawing into .*a\.npz\.unfinished \(process {os.getpid()} on"
        ):
            run(workdir, f"--out={tmp_path}/a.npz", "--num_samples=4")
        assert sorted(entry.name for entry in path.iterdir()) == [".lock", "settings.json"]
    with BlockFolder(path, {"seed": 0}) as folder:  # it has ended
        folder.remove()
    assert not list(tmp_path.iterdir())


def test_processes_take_the_checkpoint_that_the_first_has_found(workdir, tmp_path, monkeypatch):
    """A newer checkpoint may come between the looks of two processes."""
    make_workdir(tmp_path / "run")
    newer = make_workdir(tmp_path / "newer", step=2)
    (newer / "checkpoints/2").rename(tmp_path / "run/checkpoints/2")
    assert load_together(tmp_path / "run")[0] == 2
    monkeypatch.setattr("mpdit_jax.checkpoint.load.run_on_process_0", lambda action: None)  # this is not process 0
    monkeypatch.setattr("mpdit_jax.checkpoint.load.broadcast", lambda value: 1)
    assert load_together(tmp_path / "run")[0] == 1


def test_processes_with_other_weights_do_not_draw_together(tmp_path, monkeypatch):
    """Hosts may have different runs at one path, each on its own disk."""
    monkeypatch.setattr("mpdit_jax.distributed.collectives.gather", lambda values: [values, {"model": "b"}])
    with pytest.raises(ProcessError, match="process 1 was started with model=b instead of a"):
        BlockFolder(tmp_path / "a", {"model": "a", "workdir": "/here"})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_is_continued(workdir, tmp_path, signal_number):
    arguments = ["-m", "mpdit_jax.sample", f"--workdir={workdir}", "--steps=60", "--batch_size=4", "--num_samples=400"]
    expected, out = tmp_path / "expected.npz", tmp_path / "a.npz"
    blocks = tmp_path / "a.npz.unfinished"
    process = start(*arguments, f"--out={out}")
    while len(list(blocks.glob("*[0-9].npz"))) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    os.kill(process.pid, signal_number)
    process.wait()
    assert process.returncode != 0
    assert not out.exists()
    finished = {path: path.stat().st_mtime_ns for path in blocks.glob("*[0-9].npz")}
    assert 3 <= len(finished) < 100
    # Other settings are refused and leave everything as it is.
    with pytest.raises(InputError, match=r"a\.npz\.unfinished.*other settings \(steps: 60 there, 2 now\)"):
        main([f"--workdir={workdir}", f"--out={out}", "--steps=2", "--batch_size=4", "--num_samples=400"])
    kept = {}
    process = start(*arguments, f"--out={out}")
    while process.poll() is None and blocks.exists():
        kept |= {path: path.stat().st_mtime_ns for path in finished if path.exists()}
        time.sleep(0.005)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "of 400 images are there already" in text
    assert kept == finished  # nothing was drawn twice
    assert not blocks.exists()
    assert main([*arguments[2:], f"--out={expected}"]) == 0
    first, second = read_npz(out), read_npz(expected)
    assert all(np.array_equal(first[name], second[name]) for name in first)


MANY_DEVICES = """
import json, sys
import jax, numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
import mpdit_jax as mp
from mpdit_jax.sample.__main__ import main
workdir, out = sys.argv[1:]
assert jax.device_count() == 4
assert main([f"--workdir={workdir}", f"--out={out}", "--steps=2", "--batch_size=6", "--num_samples=10"]) == 0
model, sampler, key = mp.load_checkpoint(workdir), mp.make_sampler(steps=2, guidance_scale=2.0), jax.random.key(0)
mesh = jax.make_mesh((4,), ("devices",), (AxisType.Auto,))
structure, state = nnx.split(model)
draw = jax.shard_map(
    lambda state, labels, indices: sampler(nnx.merge(structure, state), labels, key, indices=indices),
    mesh=mesh, in_specs=(P(), P("devices"), P("devices")), out_specs=P("devices"),
)
found = np.asarray(jax.jit(draw)(state, np.arange(8), np.arange(8)))
expected = np.asarray(sampler(model, np.arange(8), key))
assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
print("fine")
"""


@pytest.mark.slow
def test_many_devices_draw_the_same(workdir, tmp_path):
    process = start("-c", MANY_DEVICES, workdir, tmp_path / "four.npz", devices=4)
    text, _ = process.communicate()
    assert text.endswith("fine\n"), text
    run(workdir, f"--out={tmp_path}/one.npz", "--num_samples=10")
    one, four = (read_npz(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("one", "four"))
    assert np.abs(one - four).max() <= 1


# Gloo gives up on a first collective after 30 s, and JAX's shutdown on the others after 300, here 5.
LATE = """
import sys, time
from functools import partial
import jax
jax.distributed.initialize = partial(jax.distributed.initialize, shutdown_timeout_seconds=5)
from mpdit_jax.runtime import cli
from mpdit_jax.sample import __main__ as sample
from mpdit_jax.sample import command
def late(seconds, function):
    def wait(*arguments):
        if jax.process_index() == 0:
            time.sleep(seconds)
        return function(*arguments)
    return wait
command.output_paths = late(32, command.output_paths)
command.save_npz = late(12, command.save_npz)
cli.run(sample.main)
"""


@pytest.mark.slow
def test_a_process_that_is_late_and_slow_to_write_is_waited_for(workdir, tmp_path):
    port, out = free_port(), tmp_path / "a.npz"
    arguments = [f"--workdir={workdir}", *FEW, "--num_samples=8", f"--out={out}"]
    processes = [start("-c", LATE, *arguments, *join_flags(port, 2, index)) for index in range(2)]
    texts = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert len(read_npz(out)["labels"]) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


MANY_PROCESSES = """
import sys, time
from pathlib import Path
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from mpdit_jax.checkpoint import load
from mpdit_jax.sample.__main__ import main
newer, load_step = Path(sys.argv.pop(3)), load.load_step
def loads_and_then_a_newer_one_comes(workdir, *arguments):
    while jax.process_index() == 1 and newer.exists():  # the second one looks after it has come
        time.sleep(0.1)
    found = load_step(workdir, *arguments)
    if jax.process_index() == 0:
        newer.rename(Path(workdir) / "checkpoints" / newer.name)
    return found
load.load_step = loads_and_then_a_newer_one_comes
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_two_processes_draw_the_same(tmp_path):
    runs = tmp_path / "runs"
    workdir, newer = make_workdir(runs / "digits"), make_workdir(runs / "newer", step=2) / "checkpoints/2"
    address = f"127.0.0.1:{free_port()}"
    arguments = [f"--workdir={workdir}", "--steps=2", "--batch_size=4", "--num_samples=18"]
    processes = [
        start("-c", MANY_PROCESSES, address, i, newer, *arguments, f"--out={tmp_path}/two.npz") for i in range(2)
    ]
    texts = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert not newer.exists()  # it came in between
    main([*arguments, "--step=1", f"--out={tmp_path}/one.npz"])
    one, two = read_npz(tmp_path / "one.npz"), read_npz(tmp_path / "two.npz")
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "runs", "two.npz"]
