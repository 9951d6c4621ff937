"""Runs with impossible settings of grids, evaluations, logs and data end well, or are refused by our own errors.

MPDIT_JAX_RUNS=1000 raises the number of configs tried.
"""

import os
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpdit_jax.checkpoint.reader import list_steps
from mpdit_jax.config import defaults
from mpdit_jax.errors import MPDiTError
from mpdit_jax.evaluate.classifier import ClassifierConfig, initialize, save_classifier
from mpdit_jax.train.loop import train
from tests.faults.configs import mutated
from tests.faults.damage import bulk

RUNS = int(os.environ.get("MPDIT_JAX_RUNS", "9"))
GROUPS = ("sample", "eval", "checkpoint", "log", "profile", "data", "mesh", "guard")
FIELDS = [field for field in defaults() if field.partition(".")[0] in GROUPS]
# Grids, evaluations and checkpoints are all on, and small.
BASE = {
    "steps": 2, "sample.every": 1, "sample.steps": 2, "sample.per_class": 1, "log.every": 1, "checkpoint.every": 1,
    "eval.every": 1, "eval.num_samples": 8, "eval.steps": 2, "eval.batch_size": 4, "eval.metrics": "fd,precision",
    "eval.classifier_steps": 2, "data.max_examples": 64,
}  # fmt: skip
NOTHING = float("nan")
OF_KIND = {
    int: st.integers(-1, 4),
    float: st.sampled_from([0.0, 0.5, 1.0, 2.5, 1e30, -1.0, NOTHING, float("inf")]),
    bool: st.booleans(),
    str: st.sampled_from(
        ["", "x", "../x", "euler", "heun", "dopri5", "classifier", "classifier:x", "efficientnet_lite0", "fd", "is,kid",
         "fd,precision,recall", "fd,fd", "sfd", ",", "digits", "all", "train", "manifest", "\0"]
    ),
    tuple: st.sampled_from([(), (0.0,), (1.0, 2.5), (1.0, 1.0), ("2",), (NOTHING,), (None,)]),
}  # fmt: skip


def value_of(field):
    return st.tuples(st.just(field), OF_KIND[type(defaults()[field])])


@pytest.mark.slow
def test_whole_runs_end_well_or_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")  # a config may name a project, and nobody is logged in
    weights = tmp_path / "classifier.safetensors"
    save_classifier(weights, initialize(ClassifierConfig(8, 8, 1, num_classes=10, base_channels=4, features=8), seed=0))
    counts = {"run": 0, "refused": 0}

    @bulk(RUNS)
    @given(st.lists(st.sampled_from(FIELDS).flatmap(value_of), min_size=1, max_size=3).map(dict))
    def one(changes):
        workdir = tmp_path / str(sum(counts.values()))
        config = mutated({**BASE, "eval.features": f"classifier:{weights}", **changes})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings of too few samples
                state = train(config, workdir)
        except MPDiTError as error:
            if not str(error) or (workdir / "metrics.jsonl").exists():
                raise  # an empty sentence, or one that comes after training had begun
            counts["refused"] += 1
            return
        assert int(state.step) == list_steps(workdir)[-1] == 2, changes
        counts["run"] += 1

    one()
    print(f"{sum(counts.values())} whole runs: {counts}")
    assert min(counts.values()) >= RUNS // 10
