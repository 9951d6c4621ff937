"""The loop keeps the last good checkpoint when steps are skipped, and refuses implicit transfers."""

import jax
import numpy as np
import pytest

from mpdit_jax.checkpoint.reader import list_steps
from mpdit_jax.config.flags import make_config_parser, parse_with_config
from mpdit_jax.data.sources import array_source
from mpdit_jax.errors import DivergedError
from mpdit_jax.train import grid, loop
from tests.tiny import saved_arrays, train_arguments


def tiny_config(workdir, *more):
    parser = make_config_parser("train", "", "")
    parser.add_argument("--workdir")
    return parse_with_config(parser, train_arguments(workdir, *more))[1]


@pytest.mark.slow
def test_the_last_good_checkpoint_outlives_a_run_that_breaks(tmp_path, monkeypatch):
    """From the sixth batch on the data are not finite: steps 6 to 8 are skipped, and step 4 is kept."""
    workdir, batches = tmp_path / "run", loop.batches

    def broken(*arguments, **options):
        for index, batch in enumerate(batches(*arguments, **options)):
            yield batch if index < 5 else {**batch, "x": np.full_like(batch["x"], np.nan)}

    monkeypatch.setattr(loop, "batches", broken)
    config = tiny_config(workdir, "--config.steps=40", "--config.guard.abort_after=3", "--config.log.every=1")
    with pytest.raises(DivergedError, match=r"by step 8, 3 steps in a row .* newest checkpoint is of step 4"):
        loop.train(config, workdir)
    assert list_steps(workdir) == [4]
    assert all(np.isfinite(array).all() for array in saved_arrays(workdir, 4).values())


@pytest.mark.slow
@pytest.mark.parametrize(("seen_at", "fields"), [
    (2, ["--config.steps=3", "--config.checkpoint.every=1", "--config.log.every=5"]),  # the checkpoint
    (2, ["--config.steps=2", "--config.checkpoint.every=1", "--config.log.every=1"]),  # the last step
    (2, ["--config.steps=9", "--config.checkpoint.every=4", "--config.log.every=2"]),  # the log
    (3, ["--config.steps=9", "--config.checkpoint.every=9", "--config.log.every=9", "--config.eval.every=3"]),
])  # fmt: skip
def test_an_update_that_overflows_is_never_saved(tmp_path, seen_at, fields):
    """A learning rate of 1e30 makes it overflow; the run ends although 100 steps may be skipped."""
    workdir = tmp_path / "run"
    more = [*fields, "--config.checkpoint.keep=1", "--config.guard.abort_after=100"]
    more += ["--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_steps=8"]  # of 0 in the first step
    with pytest.raises(DivergedError, match=rf"by step {seen_at}, an update made of finite gradients"):
        loop.train(tiny_config(workdir, *more), workdir)
    if "--config.checkpoint.every=1" not in fields:
        assert list_steps(workdir) == []
        return
    assert list_steps(workdir) == [1]
    assert max(np.abs(array).max() for array in saved_arrays(workdir, 1).values()) < 1e3


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [20, 6])  # the run of steps 5 to 7 is seen in one window, or cut by its end
def test_skips_in_a_row_count_though_later_steps_are_good(tmp_path, monkeypatch, log_every):
    """Steps skipped between two lines of the log end the run at the next line."""
    batches = loop.batches

    def broken(*arguments, **options):
        for index, batch in enumerate(batches(*arguments, **options)):
            yield {**batch, "x": np.full_like(batch["x"], np.nan)} if index in (4, 5, 6) else batch

    monkeypatch.setattr(loop, "batches", broken)
    more = ["--config.steps=20", f"--config.log.every={log_every}", "--config.checkpoint.every=4"]
    allowed = tiny_config(tmp_path / "allowed", *more, "--config.guard.abort_after=4")
    assert loop.train(allowed, tmp_path / "allowed").guard["accepted"] == 17
    refused = tiny_config(tmp_path / "refused", *more, "--config.guard.abort_after=3")
    with pytest.raises(DivergedError, match="3 steps in a row were left out"):
        loop.train(refused, tmp_path / "refused")
    assert list_steps(tmp_path / "refused") == [4]


def test_a_grid_of_a_model_that_diverges_does_not_end_the_run(tmp_path, monkeypatch):
    """An error here would end the run at the same step after every restart."""

    def diverged(*settings):
        return lambda model, labels, key: jax.numpy.full((len(labels), 8, 8, 1), np.nan)

    monkeypatch.setattr(grid, "make_sampler", diverged)
    state = loop.train(tiny_config(tmp_path / "run", "--config.sample.every=2"), tmp_path / "run")
    assert int(state.step) == 8
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 4


def test_a_grid_has_no_class_without_examples():
    source = array_source(np.zeros((3, 8, 8, 1), np.uint8), np.array([1, 3, 3]), ("0", "1", "2", "3"))
    assert grid.grid_classes(source, 5).tolist() == [1, 3]


@pytest.mark.slow
def test_a_batch_that_was_not_placed_is_refused(tmp_path, monkeypatch):
    """jax.transfer_guard is on around the step, so that arrays on the host are not copied to the devices unnoticed."""
    monkeypatch.setattr(loop, "place_batch", lambda batch, *_: dict(batch))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        loop.train(tiny_config(tmp_path / "run"), tmp_path / "run")
