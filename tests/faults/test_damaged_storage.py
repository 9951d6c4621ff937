"""A damaged checkpoint is noticed and named, and the one before it is used as a whole."""

import errno
import json
import random
import shutil
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax.checkpoint import digests as integrity
from mpdit_jax.checkpoint.load import load_config
from mpdit_jax.checkpoint.manager import Checkpoints
from mpdit_jax.checkpoint.reader import list_steps, read_step
from mpdit_jax.config import model_config
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import CheckpointError, DamageWarning, UnavailableError
from mpdit_jax.model.parameters import split
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state, to_items
from mpdit_jax.train.writers import MetricsFile
from tests.tiny import assert_same_bits, optimized, run, saved_arrays, train_arguments

# Orbax's readers leave unfinished tasks behind when a file is damaged.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def target_of(workdir):
    config = load_config(workdir)
    return to_items(abstract_state(model_config(config), make_optimizer(config.optimizer), make_mesh()))


def restore(workdir):
    """Return what `train` would continue from: step, arrays by path, notes."""
    with Checkpoints(workdir, keep=3) as checkpoints:
        found = checkpoints.restore_newest(target_of(workdir))
    return found.step, by_path(found.items), found.notes


def by_path(items):
    leaves = jax.tree_util.tree_flatten_with_path(items)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def copy_of(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    return copy, copy / "checkpoints" / "8"


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def data_files(folder):
    return [path for path in files_of(folder) if path.parent.name == "d"]


def flip_a_bit(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(folder):
    for path in data_files(folder):
        path.write_bytes(path.read_bytes()[:-7])


def half_delete(folder):
    for path in files_of(folder)[::2]:
        path.unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def empty_files(folder):
    for path in data_files(folder):
        path.write_bytes(b"")


def lose_an_item(folder):
    shutil.rmtree(folder / "optimizer")


def lose_the_digests(folder):
    (folder / "integrity" / "metadata").unlink()


def leave_the_digests_out(folder):
    """Make the checkpoint one that Orbax alone could have saved."""
    shutil.rmtree(folder / "integrity")
    path = folder / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    del metadata["item_handlers"]["integrity"]
    path.write_text(json.dumps(metadata))


def forge_a_digest(folder):
    path = folder / "integrity" / "metadata"
    record = json.loads(path.read_text())
    record["items"]["ema_parameters"]["final.bias"] = record["items"]["parameters"]["final.kernel"]
    path.write_text(json.dumps(record))


def rename_a_digests_key(folder):
    """Change one character of a name, as a flipped bit does."""
    path = folder / "integrity" / "metadata"
    path.write_text(path.read_text().replace('"step"', '"stap"'))


def empty_the_digests(folder):
    path = folder / "integrity" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "items": 3}))


def flatten_the_digests(folder):
    path = folder / "integrity" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "items": {"ema_parameters": 3}}))


def bury_the_digests(folder):
    """Nest the digests more deeply than Python's parser can read."""
    (folder / "integrity" / "metadata").write_text("[" * 10**5)


def replace_by_an_older_one(folder):
    """Put an undamaged checkpoint of another step in its place."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "4", folder)


DAMAGES = [
    truncate, half_delete, empty, empty_files, lose_an_item, lose_the_digests, leave_the_digests_out, forge_a_digest,
    rename_a_digests_key, empty_the_digests, flatten_the_digests, bury_the_digests, replace_by_an_older_one,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_one_before_is_used(finished, tmp_path, damage):
    copy, newest = copy_of(finished, tmp_path)
    expected = split(mp.load_checkpoint(finished, step=4))[1]
    damage(newest)
    if damage is not lose_an_item:  # sampling does not read the optimizer
        with pytest.raises(CheckpointError, match=r"checkpoints/8 .*move it away to use another \(there are: 4\)"):
            mp.load_checkpoint(copy, step=8)
    with pytest.warns(DamageWarning, match=r"checkpoints/8 .*; step 4 is used"):
        model = mp.load_checkpoint(copy)
    assert_same_bits(expected, split(model)[1])
    step, arrays, notes = restore(copy)
    assert step == 4
    assert_same_bits(by_path(read_step(finished / "checkpoints" / "4", target_of(finished))), arrays)
    assert len(notes) == 1
    assert f"it is now in {copy}/damaged_checkpoints/8, and step 4 is used" in notes[0]
    assert list_steps(copy) == [4]


def a_newer_version(folder, monkeypatch):
    path = folder / "integrity" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))


def a_file_that_may_not_be_read(folder, monkeypatch):
    """Refuse to read a file, as the system does with another user's; root could read a real one."""
    read = Path.read_text

    def refuse(path, *arguments, **options):
        if path == folder / "_CHECKPOINT_METADATA":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)


def too_many_open_files(folder, monkeypatch):
    """Raise TensorStore's error for too many open files."""

    def refuse(self, *arguments, **options):
        raise ValueError("UNAVAILABLE: Error opening file [OS error 24: EMFILE Too many open files]")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", refuse)


@pytest.mark.parametrize("refused", [a_newer_version, a_file_that_may_not_be_read, too_many_open_files])
def test_what_may_be_sound_is_not_set_aside(finished, tmp_path, monkeypatch, refused):
    """A checkpoint that may be undamaged stays in place, as training from an older one would lose steps."""
    copy, newest = copy_of(finished, tmp_path)
    refused(newest, monkeypatch)
    with pytest.raises(UnavailableError, match=r"checkpoints/8 .*need not be damage, and nothing was moved: make it"):
        restore(copy)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["4", "8"]
    assert not (copy / "damaged_checkpoints").exists()


@pytest.mark.slow
def test_a_flipped_bit_is_never_loaded(finished, tmp_path):
    """With a flipped bit in any file, the arrays are those that were saved, or the checkpoint is refused."""
    seed = random.SystemRandom().randrange(2**32)
    draw = random.Random(seed)
    print(f"seed {seed}")
    expected = restore(finished)[1]
    copy, newest = copy_of(finished, tmp_path)
    refused = 0
    # Half of the files are never read, such as outdated trees of keys and Orbax's own records.
    arrays_are_in = sorted(data_files(newest), key=lambda path: path.stat().st_size)[-5:]
    files = draw.sample(files_of(newest), 10) + arrays_are_in
    for path in files:
        before = path.read_bytes()
        flip_a_bit(path, draw)
        step, arrays, notes = restore(copy)
        assert step in (4, 8), f"seed {seed}, {path}"
        if step == 8:
            assert_same_bits(expected, arrays)
        else:
            refused += 1
            assert "checkpoints/8" in notes[0]
            (copy / "damaged_checkpoints" / "8").rename(newest)
        path.write_bytes(before)
    assert refused > 2, f"seed {seed}"
    assert_same_bits(expected, restore(copy)[1])


@pytest.mark.slow
def test_training_goes_on_from_the_one_before(finished, tmp_path):
    """One sentence tells of the damage, and the run ends in the bits of a run without damage."""
    copy, newest = copy_of(finished, tmp_path)
    truncate(newest)
    status, stdout, stderr = run("train", train_arguments(copy))
    assert status == 0, stderr
    assert stdout.count("damaged_checkpoints/8, and step 4 is used.") == 1
    assert "continuing at step 4" in stdout
    assert_same_bits(saved_arrays(finished, 8), saved_arrays(copy, 8))
    assert (copy / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert (copy / "damaged_checkpoints" / "8").is_dir()  # nothing is deleted


def test_nothing_is_touched_if_no_checkpoint_is_whole(finished, tmp_path):
    copy, newest = copy_of(finished, tmp_path)
    truncate(newest)
    empty(newest.parent / "4")
    with pytest.raises(CheckpointError, match=r"checkpoints/8 .*neither can the other 1: restore one from a copy"):
        restore(copy)
    assert {path.name for path in newest.parent.iterdir()} == {"4", "8"}
    status, _, stderr = run("train", train_arguments(copy))
    # TensorStore may print tracebacks of its threads beside it, without an end of the line.
    assert (status, stderr.count("error: the checkpoint ")) == (1, 1), stderr


def test_a_folder_made_by_hand_is_no_checkpoint(finished, tmp_path):
    """A folder with a number for a name is not counted, not sampled from, and not deleted."""
    copy, newest = copy_of(finished, tmp_path)
    for name in ("2", "100"):
        (newest.parent / name).mkdir()
        (newest.parent / name / "notes.txt").write_text("mine")
    (newest.parent / "008").mkdir()
    assert list_steps(copy) == [4, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamageWarning)
        assert_same_bits(split(mp.load_checkpoint(finished))[1], split(mp.load_checkpoint(copy))[1])
    step, _, notes = restore(copy)
    assert step == 8
    assert len(notes) == 2
    for name in ("2", "100"):
        assert (copy / "damaged_checkpoints" / name / "notes.txt").read_text() == "mine"


def test_digests_notice_every_bit():
    draw = np.random.default_rng(0)
    tree = {"a": draw.normal(size=(7, 5)).astype(np.float32), "b": np.arange(6, dtype=np.int32), "c": np.float32(2)}
    tree |= {"d": draw.normal(size=9).astype(jax.numpy.bfloat16), "e": np.zeros((0, 3), np.float32)}
    saved = integrity.digests(jax.tree.map(jax.numpy.asarray, tree))
    for name in "abcd":
        for _ in range(8):
            changed = np.array(tree[name])
            flat = changed.reshape(-1).view(np.uint8)
            flat[draw.integers(flat.size)] ^= 1 << draw.integers(8)
            found = integrity.digests(jax.tree.map(jax.numpy.asarray, tree | {name: changed}))
            assert integrity.differing(saved, found) == [name]
    swapped = tree | {"a": tree["a"][::-1]}
    assert integrity.differing(saved, integrity.digests(jax.tree.map(jax.numpy.asarray, swapped))) == ["a"]
    assert integrity.differing(saved, {name: value for name, value in saved.items() if name != "e"}) == ["e"]


def test_what_digests_cost(tmp_path):
    """Computing digests takes less than half of the time of saving the same arrays; the share is printed."""
    draw = np.random.default_rng(0)
    tree = {str(number): jax.numpy.asarray(draw.normal(size=(2**20, 8)).astype(np.float32)) for number in range(2)}
    with optimized():
        integrity.digests(tree)  # compiles the program
    seconds = {"digests": [], "saving": []}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in range(1, 4):
            since = time.perf_counter()
            integrity.digests(tree)
            seconds["digests"].append(time.perf_counter() - since)
            since = time.perf_counter()
            checkpoints.save(step, {"arrays": tree})
            checkpoints.wait()
            seconds["saving"].append(time.perf_counter() - since)
    share = min(seconds["digests"]) / min(seconds["saving"])
    size = sum(leaf.nbytes for leaf in tree.values()) / 2**20
    print(f"digests of {size:.0f} MiB take {share:.0%} of what saving takes, digests included")
    assert share < 0.5


def test_a_damaged_line_of_the_log_costs_no_other(tmp_path):
    """Lines after the checkpoint and a half-written last line are removed; a damaged line before them stays."""
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": %d, "loss": 1.0}' % step for step in range(1, 7)]
    lines[1] = b"\xfb" + lines[1][1:]
    path.write_bytes(b"\n".join([*lines, b'{"step": 3, "lo']))
    MetricsFile(path, start=5).close()
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines[:5])
