"""Random configs and command lines, in bulk, lead to a step that can be traced, or are refused by our own errors.

MPDIT_JAX_MUTATIONS=20000 raises the number of configs, MPDIT_JAX_RUNS=1000 the number of steps that are run.
"""

import os
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpdit_jax.config import defaults, model_config, resolve
from mpdit_jax.data.sources import check_fits, load_source
from mpdit_jax.distributed.mesh import check_batch, make_mesh
from mpdit_jax.errors import MPDiTError
from mpdit_jax.model.parameters import abstract
from mpdit_jax.train.__main__ import main
from mpdit_jax.train.optimizer import make_optimizer
from mpdit_jax.train.state import abstract_state, create_state
from mpdit_jax.train.step import make_loss, make_noising, make_step
from tests.faults.configs import TINY, mutated
from tests.faults.damage import MUTATIONS, REAL, TUPLE, WHOLE, WORD, bulk
from tests.tiny import ROOT

RUNS = int(os.environ.get("MPDIT_JAX_RUNS", "3"))
VALUE = st.one_of(WHOLE, REAL, WORD, TUPLE, st.booleans(), st.none(), st.just({}), st.just([1]))
FIELD = st.sampled_from([*defaults(), "model.hiden_size", "unknown", "optimizer"])
# Values of the field's own type: with others, hardly a config would pass the checks of types.
LIKELY = {int: st.integers(1, 8), float: st.floats(0.01, 0.99), bool: st.booleans()}


def value_of(field):
    """Draw any value, or one that the field may have."""
    kind = type({**defaults(), **TINY}.get(field))
    return st.one_of(LIKELY[kind], LIKELY[kind], VALUE) if kind in LIKELY else VALUE


CHANGE = FIELD.flatmap(lambda field: st.tuples(st.just(field), value_of(field)))
CHANGES = st.lists(CHANGE, min_size=1, max_size=3).map(dict)


# A config of masked training, which three changes of the other config do not lead to.
MASKED = {"mask_ratio": 0.5, "model.decoder_depth": 1, "model.patch_sizes": (1,), "model.depths": (2,)}
BASE = st.sampled_from([{}, {}, MASKED])

REACHED = {}  # from the fields that decide a step to the first traced config that has them


def build_train_step(architecture, batch, accumulation, optimizer, time, dropout, decay, spike, ratio, weight):
    """The training step, its optimizer, and the shapes of its examples."""
    masked = {**MASKED, "mask_ratio": ratio, "model.patch_sizes": architecture.patch_sizes} if ratio else {}
    config = mutated({"batch_size": batch, "label_dropout": dropout, **masked})
    config.optimizer.update(dict(optimizer))
    config.time.update(dict(time))
    resolved = resolve(config)
    made = make_optimizer(resolved.optimizer)
    step = make_step(
        make_noising(resolved), make_loss(abstract(architecture)[0], weight), made, decay, accumulation=accumulation,
        spike_factor=spike,
    )  # fmt: skip
    shape = (batch, *architecture.input_size, architecture.in_channels)
    examples = {"x": jax.ShapeDtypeStruct(shape, jnp.float32), "y": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    return step, made, examples


@cache
def traces(architecture, *settings):
    """Return whether the whole step can be traced, with the gradient and the update of every parameter."""
    step, made, examples = build_train_step(architecture, *settings)
    state = abstract_state(architecture, made, make_mesh())
    after = jax.eval_shape(step, state, examples)
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, state)
    return True


def try_config(changes):
    """Do what `train` does up to the compilation of its first step; return whether that is reached."""
    config = mutated(changes)
    if config is None:
        return False
    try:
        resolved = resolve(config)
        architecture, mesh = model_config(resolved), make_mesh(**resolved.mesh)
        check_batch(resolved.batch_size, mesh, resolved.gradient_accumulation)
        source = load_source(**resolved.data)
        check_fits(source, (*architecture.input_size, architecture.in_channels), architecture.num_classes)
    except MPDiTError as error:
        if not str(error):
            raise
        return False
    settings = (
        architecture, resolved.batch_size, resolved.gradient_accumulation, tuple(resolved.optimizer.items()),
        tuple(resolved.time.items()), resolved.label_dropout, resolved.ema_decay, resolved.guard.spike_factor,
        resolved.mask_ratio, resolved.mask_loss_weight,
    )  # fmt: skip
    assert traces(*settings), changes
    REACHED.setdefault(settings, changes)
    return True


@pytest.mark.slow
def test_configs_are_traced_or_refused():
    outcome = {True: 0, False: 0}

    @bulk(MUTATIONS)
    @given(BASE, CHANGES)
    def one(base, changes):
        outcome[try_config({**base, **changes})] += 1

    one()
    print(f"{sum(outcome.values())} mutated configs: {outcome[True]} traced, {outcome[False]} refused")
    assert sum(outcome.values()) >= MUTATIONS
    assert min(outcome.values()) > MUTATIONS // 50
    assert any(masked for *_, masked, _ in REACHED)


@pytest.mark.slow
def test_what_is_traced_is_run():
    """One real step runs for each different program among the traced configs, or for RUNS of them."""
    if not REACHED:
        test_configs_are_traced_or_refused()
    chosen = list(REACHED.items())[:: -(-len(REACHED) // RUNS)]
    for settings, changes in chosen:
        step, made, examples = build_train_step(*settings)
        state = create_state(settings[0], made, abstract_state(settings[0], made, make_mesh()), 0)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), examples)
        assert int(jax.jit(step)(state, zeros).step) == 1, changes
    print(f"{len(chosen)} of the {len(REACHED)} different steps among them were run")


@pytest.mark.slow
def test_a_whole_run_of_many_changes(tmp_path):
    from mpdit_jax.train.loop import train

    changes = {"gradient_accumulation": 2, "guard.spike_factor": 5.0, "data.max_examples": 9, "optimizer.name": "muon"}
    changes |= {"data.class_balance": True, "time.distribution": "uniform", "model.dtype": "bfloat16"}
    assert try_config(changes)
    assert int(train(mutated(changes), tmp_path / "run").step) == 1


ARGUMENT = st.one_of(
    st.sampled_from([
        "--workdir=x", "--workdir=", "--workdir=s3://b", "--config", "--config=", "--config.steps", "--config.steps=",
        "--config.steps=3", "--config.model", "--config.model=3", "--config.model.depths[0]=2",
        "--config.model.depths[9]=2",
        "--config.model.depths=(", "--config.model.depths=1,", "--noconfig.model.skip", "--noconfig.steps",
        "--config.=3", "--config..x=1", "--config.optimizer.b1.x=2",
        "--config.seed=1e3", "--config.data.path=\0", "--num_processes=2",
        "--process_id=0", "--coordinator_address=h:1", "--initialization_timeout=-1", "--heartbeat_timeout=x",
        "--replay_step=0",
        "--replay_step=x", "--", "-", "", "-x", "=", "--=", "--config.model.skip=2", "--config.model.preset=no",
        "--config=configs/digits.py:argument",
    ]),
    st.builds("--config.{}={}".format, FIELD, st.one_of(st.text(max_size=8), WHOLE, REAL, TUPLE)),
    st.text(max_size=12),
)  # fmt: skip


class Reached(MPDiTError):
    """The command line was accepted."""


def test_command_lines(monkeypatch, capsys):
    """A command line ends with status 2 and one sentence, raises our own error, or begins a training."""
    counts, ends = dict.fromkeys(("refused by the parser", "refused by a check", "accepted"), 0), []

    def reached(config, workdir):
        resolve(config)
        raise Reached("fine")

    monkeypatch.setattr("mpdit_jax.train.loop.train", reached)
    monkeypatch.setattr("mpdit_jax.train.replay.replay", lambda config, workdir, step: reached(config, workdir))
    monkeypatch.setattr("mpdit_jax.train.__main__.join", lambda options, facts: None)

    @bulk(MUTATIONS // 4)
    @given(st.lists(ARGUMENT, max_size=4), st.booleans())
    def one(arguments, complete):
        before = [f"--config={ROOT / 'configs/digits.py'}", "--workdir=x"] if complete else []
        try:
            main([*before, *arguments])
        except Reached:
            counts["accepted"] += 1
        except MPDiTError:
            counts["refused by a check"] += 1
        except SystemExit as end:
            ends.append((end.code, len(capsys.readouterr().err.strip().splitlines()), arguments))
            counts["refused by the parser"] += 1

    one()
    for status, lines, arguments in ends:
        assert (status, lines) == (2, 1) or {"--help", "-h"} & {*arguments}, arguments
    print(f"command lines: {counts}")
    assert min(counts.values()) > 0
