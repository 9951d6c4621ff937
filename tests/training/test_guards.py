"""What the loop itself guards: the last good checkpoint when steps stop counting, and transfers nobody asked for."""

import jax
import numpy as np
import pytest

from mpdit_jax.cli import make_parser, parse_with_config
from mpdit_jax.errors import DivergedError
from mpdit_jax.stored import list_steps
from mpdit_jax.training import loop
from tests.tiny import saved_arrays, train_arguments


def tiny_config(workdir, *more):
    parser = make_parser("train", "", "", config=True)
    parser.add_argument("--workdir")
    return parse_with_config(parser, train_arguments(workdir, *more))[1]


def test_the_last_good_checkpoint_outlives_a_run_that_breaks(tmp_path, monkeypatch):
    """From the sixth batch on the data are not finite: steps 6 to 8 are left out, and step 4 is what is kept."""
    workdir, batches = tmp_path / "run", loop.batches

    def broken(*arguments, **options):
        for index, batch in enumerate(batches(*arguments, **options)):
            yield batch if index < 5 else {**batch, "x": np.full_like(batch["x"], np.nan)}

    monkeypatch.setattr(loop, "batches", broken)
    config = tiny_config(workdir, "--config.steps=40", "--config.guard.abort_after=3", "--config.log.every=1")
    with pytest.raises(DivergedError, match=r"last 3 steps up to 8 .* newest checkpoint is of step 4"):
        loop.train(config, workdir)
    assert list_steps(workdir) == [4]
    assert all(np.isfinite(array).all() for array in saved_arrays(workdir, 4).values())


def test_a_batch_that_was_not_placed_is_refused(tmp_path, monkeypatch):
    """jax.transfer_guard is on around the step: what is still on the host may not slip onto the devices."""
    monkeypatch.setattr(loop, "place_batch", lambda batch, *_: dict(batch))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        loop.train(tiny_config(tmp_path / "run"), tmp_path / "run")
