"""A run that is stopped and continued ends in the same bits as one that is left alone."""

import json
import shlex
import shutil
import signal
import subprocess

import pytest

from mpdit_jax.checkpoint.reader import list_steps
from mpdit_jax.errors import CheckpointError, InputError
from mpdit_jax.train.__main__ import main
from tests import tiny
from tests.tiny import TWO_LEVELS, assert_same_bits, environment, run, saved_arrays, start


def train_arguments(workdir, *more):
    """Return the tiny run's arguments with a model of two levels."""
    return tiny.train_arguments(workdir, *TWO_LEVELS, *more)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, stdout, stderr = run("train", [*train_arguments(workdir), "--parameter_table"])
    assert status == 0, stderr
    return workdir, stdout


@pytest.mark.slow
def test_what_a_run_leaves_behind(undisturbed):
    workdir, stdout = undisturbed
    assert "levels.0.blocks.layers.mlp.inner.kernel" in stdout  # --parameter_table
    assert "step 8/8" in stdout
    assert "images/s" in stdout
    assert "left" in stdout
    assert f"done: checkpoints in {workdir}/checkpoints" in stdout
    assert list_steps(workdir) == [4, 8]
    assert json.loads((workdir / "config.json").read_text())["model"]["hidden_size"] == 16
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert all(0 < line["loss"] < 10 and line["gradient_norm"] > 0 for line in lines)


def test_event_files_hold_scalars_and_config(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workdir, _ = undisturbed
    events = EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in metrics
    ]
    assert "images_per_second" in events.Tags()["scalars"]
    assert (
        b"hidden_size"
        in events.Tensors("config/text_summary" if "config/text_summary" in events.Tags()["tensors"] else "config")[
            0
        ].tensor_proto.string_val[0]
    )


@pytest.mark.slow
def test_continued_run_is_bitwise_equal(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    assert run("train", train_arguments(workdir, "--config.steps=4"))[0] == 0
    status, stdout, stderr = run("train", train_arguments(workdir))
    assert status == 0, stderr
    assert "continuing at step 4" in stdout
    assert "mlp.inner.kernel" not in stdout  # the table is printed when asked for
    assert_same_bits(saved_arrays(undisturbed[0], 8), saved_arrays(workdir, 8))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(tmp_path, number):
    """The step in hand is finished and saved, the status is 0, and the printed command continues to the same bits."""
    long = ["--config.steps=4000", "--config.checkpoint.every=100000", "--config.log.every=50"]
    workdir = tmp_path / "run"
    process = start("train", train_arguments(workdir, *long))
    for line in process.stdout:
        if "images/s" in line:
            break
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    (stopped,) = list_steps(workdir)
    assert 50 <= stopped < 4000
    assert f"stopped at step {stopped} of 4000, saved; continue with:" in stdout
    again = stdout.splitlines()[-1]
    assert shlex.split(again)[3:] == train_arguments(workdir, *long)
    if number == signal.SIGINT:  # from here on it is the same
        return
    until = stopped - stopped % 50 + 50  # the log line whose window the stop fell into
    ends = [f"--config.steps={until}", "--config.checkpoint.every=100000", "--config.log.every=50"]
    # As printed, in a shell; only its end is brought forward.
    assert subprocess.run(f"{again} --config.steps={until}", shell=True, env=environment(), check=False).returncode == 0
    other = tmp_path / "other"
    assert run("train", train_arguments(other, *ends))[0] == 0
    assert_same_bits(saved_arrays(other, until), saved_arrays(workdir, until))
    assert (other / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_says_that_it_begins_again(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir, ignore=shutil.ignore_patterns("4", "8"))
    first = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)[0]  # of step 3, and it saves every fourth
    (workdir / "metrics.jsonl").write_text(first)
    (workdir / ".saved").unlink()
    status, stdout, stderr = run("train", train_arguments(workdir))
    assert status == 0, stderr
    assert f"an earlier start of this run left no checkpoint in {workdir}; it begins again" in stdout
    assert_same_bits(saved_arrays(undisturbed[0], 8), saved_arrays(workdir, 8))
    assert (workdir / "metrics.jsonl").read_text() == (undisturbed[0] / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_keeps_its_record(undisturbed, tmp_path):
    """The log of lost checkpoints cannot be made again, so that it is renamed and not overwritten."""
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run", ignore=shutil.ignore_patterns("4", "8"))
    (workdir / "metrics.jsonl").write_text((undisturbed[0] / "metrics.jsonl").read_text() + " \n")
    status, stdout, stderr = run("train", train_arguments(workdir))
    assert status == 0, stderr
    assert "holds no checkpoint, but the record of this run, now in" in stdout
    assert (workdir / "metrics.1.jsonl").read_text().endswith(" \n")
    assert (workdir / "metrics.jsonl").read_text() == (undisturbed[0] / "metrics.jsonl").read_text()


def test_checkpoints_on_a_disk_that_is_not_mounted(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (workdir / "checkpoints").symlink_to(tmp_path / "not mounted")
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"checkpoints is a link to .*not mounted, which is not there: mount it"):
        main(train_arguments(workdir))
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_finished_run_says_so_and_changes_nothing(undisturbed):
    workdir, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*") if path.is_file()}
    status, stdout, _ = run("train", train_arguments(workdir))
    assert status == 0
    assert "is done: 8 of 8 steps" in stdout
    after = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*") if path.is_file()}
    assert before == after
    stored = (workdir / "config.json").read_bytes()
    status, stdout, _ = run("train", train_arguments(workdir, "--config.steps=4"))
    assert status == 0
    assert "is done: 8 of 4 steps" in stdout
    assert (workdir / "config.json").read_bytes() == stored


@pytest.mark.parametrize(("name", "folder"), [("checkpoints", False), ("tensorboard", False), ("metrics.jsonl", True)])
def test_something_else_in_the_place_of_an_output(tmp_path, name, folder):
    place = tmp_path / "run" / name
    place.parent.mkdir()
    if folder:
        place.mkdir()
    else:
        place.write_text("mine")
    with pytest.raises(InputError, match=f"cannot write .*{name}: a .* is in its place"):
        main(train_arguments(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("text", ['{"_class_name": "AutoencoderKL"}', "mine", "[]"])
def test_somebody_elses_config_is_not_overwritten(tmp_path, text):
    """A VAE's folder, given as --workdir, has such a config.json."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is not of a run of this project.*use another --workdir"):
        main(train_arguments(tmp_path))
    assert (tmp_path / "config.json").read_text() == text


def test_somebody_elses_data_are_not_overwritten(tmp_path):
    (tmp_path / "data.json").write_text('{"rows": []}')
    with pytest.raises(CheckpointError, match=r"data\.json is not of a run of this project.*use another --workdir"):
        main(train_arguments(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["data.json"]


@pytest.mark.slow
def test_damaged_facts_of_the_data_are_written_anew_as_the_error_says(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run")
    whole = (workdir / "data.json").read_bytes()
    (workdir / "data.json").write_bytes(whole[:20])
    with pytest.raises(CheckpointError, match="delete it and repeat the training command, which writes it anew"):
        main(train_arguments(workdir))
    (workdir / "data.json").unlink()
    assert main(train_arguments(workdir)) == 0
    assert (workdir / "data.json").read_bytes() == whole


@pytest.mark.slow
def test_a_folder_that_a_killed_conversion_left_is_cleared_or_left_alone(tmp_path):
    for name in (".model.safetensors.k1ll3d_0.tmp", ".config.json.k1ll3d_0.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".samples.npz.k1ll3d_0.tmp").write_text("half, of a command that still runs")
    assert main(train_arguments(tmp_path, "--config.steps=1")) == 0
    left = {path.name for path in tmp_path.glob(".*.tmp")}
    assert left == {".model.safetensors.k1ll3d_0.tmp", ".samples.npz.k1ll3d_0.tmp"}


def test_another_model_is_refused_with_the_difference(undisturbed):
    workdir, _ = undisturbed
    stored = (workdir / "config.json").read_bytes()
    more = ["--config.model.hidden_size=32", "--config.steps=20", "--config.optimizer.learning_rate=0.5"]
    status, _, stderr = run("train", train_arguments(workdir, *more))
    assert status == 1
    assert "config.model.hidden_size: 16 in the run, 32 now" in stderr
    assert "config.optimizer.learning_rate: 0.001 in the run, 0.5 now" in stderr
    assert "config.steps" not in stderr  # may change
    assert "Traceback" not in stderr
    assert (workdir / "config.json").read_bytes() == stored
    assert list_steps(workdir) == [4, 8]


@pytest.mark.slow
def test_keeps_the_newest_and_every_nth(tmp_path):
    keep = ["--config.checkpoint.every=1", "--config.checkpoint.keep=2", "--config.checkpoint.keep_every=3"]
    assert run("train", train_arguments(tmp_path / "run", *keep))[0] == 0
    assert list_steps(tmp_path / "run") == [3, 6, 7, 8]


@pytest.mark.slow
def test_two_trainings_do_not_share_a_workdir(tmp_path):
    """The second is refused while the first runs, and the first goes on."""
    workdir, long = tmp_path / "run", ["--config.steps=3000", "--config.log.every=50", "--config.checkpoint.every=1000"]
    first = start("train", train_arguments(workdir, *long))
    for line in first.stdout:
        if "images/s" in line:
            break
    status, _, stderr = run("train", train_arguments(workdir, *long))
    assert status == 1
    assert f"another training is writing to {workdir} (process {first.pid} on " in stderr
    assert "Traceback" not in stderr
    first.send_signal(signal.SIGTERM)
    stdout, stderr = first.communicate(timeout=120)
    assert first.returncode == 0, stderr
    assert "saved; continue with" in stdout


@pytest.mark.slow
def test_a_diverged_state_is_never_saved(tmp_path):
    more = ["--config.optimizer.learning_rate=1e30", "--config.log.every=8", "--config.checkpoint.every=1"]
    more += ["--config.guard.abort_after=3"]
    status, _, stderr = run("train", train_arguments(tmp_path / "run", *more))
    assert status == 3
    assert "by step 1, an update made of finite gradients was not finite" in stderr
    assert "there is no checkpoint" in stderr
    assert "start again in a new --workdir" in stderr
    assert list_steps(tmp_path / "run") == []


@pytest.mark.slow
def test_a_config_without_checkpoints_binds_nothing(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_bytes((undisturbed[0] / "config.json").read_bytes())
    before = {"config.1.json": (workdir / "config.json").read_bytes(), "metrics.1.jsonl": b'{"step": 7}\n'}
    (workdir / "metrics.jsonl").write_bytes(before["metrics.1.jsonl"])
    before["data.1.json"] = b'{"class_names": ["one"], "latents": null}'
    (workdir / "data.json").write_bytes(before["data.1.json"])
    (workdir / "samples").mkdir()
    status, stdout, stderr = run("train", train_arguments(workdir, "--config.optimizer.learning_rate=2e-3"))
    assert status == 0, stderr
    assert json.loads((workdir / "config.json").read_text())["optimizer"]["learning_rate"] == 2e-3
    # Whatever became of the checkpoints, the record of that run is kept.
    assert (
        f"another run, now in {workdir / 'config.1.json'}, {workdir / 'data.1.json'}, {workdir / 'samples.1'}, "
        f"{workdir / 'metrics.1.jsonl'}." in stdout
    )
    assert {name: (workdir / name).read_bytes() for name in before} == before
