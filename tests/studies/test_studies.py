"""The studies of docs/: they continue after an interruption, compare equal budgets, and write tables and plots."""

import json
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from mpdit_jax.config import resolve
from mpdit_jax.data.sources import array_source
from mpdit_jax.errors import DataError, DivergedError, InputError
from mpdit_jax.model.accounting import count_macs, count_trained
from mpdit_jax.model.parameters import abstract, merge
from studies import flow_map, fno_width, token_budget
from studies.flow_map_models import KINDS, Recipe, Zoo, make_trainer, passes_per_step
from studies.records import Records
from studies.trainer import Trainer

RUNS = [{"model": name, "seed": seed} for name in ("a", "b") for seed in (0, 1)]


def test_finished_runs_are_not_repeated(tmp_path):
    path, done = tmp_path / "new" / "records.jsonl", []

    def measure(settings, stop_after):
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(settings)
        return {"loss": len(done)}

    with pytest.raises(KeyboardInterrupt):
        Records(path).run("testing", RUNS, lambda settings: measure(settings, 2))
    with path.open("a") as file:
        file.write('{"model": "b", "se')  # an interrupted write
    found = Records(path).run("testing", RUNS, lambda settings: measure(settings, None))
    assert done == RUNS
    assert [record["loss"] for record in found] == [1, 2, 3, 4]
    assert [json.loads(line) for line in path.read_text().splitlines()] == found
    assert Records(path).run("testing", RUNS[::-1], lambda settings: measure(settings, 0)) == found[::-1]


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "records.jsonl").write_text("not JSON\n{}\n")
    with pytest.raises(DataError, match="has a line that is not JSON"):
        Records(tmp_path / "records.jsonl")


def test_models_of_one_size_and_one_budget():
    parameters = [count_trained(token_budget.matched_config(name)) for name in token_budget.MODELS]
    assert max(parameters) / min(parameters) < 1.001
    for name in token_budget.MODELS:
        config = token_budget.training_config(name, 2000, "")
        spent = config.steps * config.batch_size * token_budget.training_macs(name) / 1e9
        assert spent == pytest.approx(2000, rel=0.01)
    with pytest.raises(InputError, match="--steps=5: expected 10 or more"):
        fno_width.main(["--steps=5"])
    with pytest.raises(InputError, match="--budget=0"):
        token_budget.main(["--budget=0"])


@pytest.mark.slow
def test_a_short_run_is_measured():
    """A run of twenty steps records the means of ten steps each."""
    found = fno_width._measure_training({"init": "scaled", "width": 8, "steps": 20, "seed": 0})
    first, second = found["losses"]
    assert 0.8 < second < first < 2.5
    assert len(found["gradient_norms"]) == 2
    assert found["skipped"] == 0


@pytest.fixture(scope="module")
def reckless():
    """Train ten steps, of which the first update is not finite."""
    config = fno_width.training_config("scaled", 8, 10)
    config.model.depths, config.model.hidden_size = (1, 1), 16
    config.optimizer.learning_rate = 1e30
    return Trainer(config)


@pytest.mark.slow
def test_a_diverged_run_is_an_error(reckless):
    with pytest.raises(DivergedError, match="in 10 steps with seed 5, an update made of finite gradients was not"):
        list(reckless.states(5))


def test_skipped_steps_are_a_result_of_fno_width_and_an_error_of_token_budget(reckless, monkeypatch):
    images = np.full((1, *reckless.source.shape), np.nan, np.float32)
    monkeypatch.setattr(reckless, "source", array_source(images, np.zeros(1, np.int32), ("0",)))
    monkeypatch.setattr(fno_width, "_trainer", lambda *_: reckless)
    found = fno_width._measure_training({"init": "scaled", "width": 8, "steps": 10, "seed": 0})
    assert (found["skipped"], np.isnan(found["losses"]).all()) == (10, True)
    monkeypatch.setattr(token_budget, "_trainer", lambda *_: reckless)
    for name in ("held_out_loss", "accuracy"):
        monkeypatch.setattr(token_budget, name, lambda *_: 0.0)
    with pytest.raises(DivergedError, match="coarse, seed 3: 2 of the first 2 of 10 steps were left out"):
        token_budget.measure({"model": "coarse", "budget": 1, "seed": 3, "samples": 1}, "")


def fake_records():
    start = [
        {"init": init, "width": width, "seeds": 8} | dict.fromkeys(
            ("output_rms", "output_rms_std", "gradient_norm", "gradient_norm_std"), 1.0
        )
        for init in ("paper", "scaled")
        for width in fno_width.WIDTHS
    ]  # fmt: skip
    trained = [
        {"init": init, "width": width, "losses": [1.0, 0.5 + 0.1 * seed], "gradient_norms": [3.0, np.nan], "skipped": 2}
        for init in ("paper", "scaled")
        for width in fno_width.TRAINED_WIDTHS
        for seed in range(3)
    ]
    return start, trained


def test_tables():
    start, trained = fake_records()
    text = fno_width.as_tables(start, trained)
    assert text.count("| 1.000 ± 0.000 | 0.600 ± 0.100 | 3.000 ± 0.000 | 6 |") == 4
    text = token_budget.as_table(budget_records())
    assert text.count("| 2,000 | 0.6000 ± 0.1000 | 0.900 ± 0.000 |") == 2


def budget_records():
    return [
        {"model": name, "parameters": 1000, "forward_mmacs": 2.0, "steps": 30}
        | {"points": [{"gmacs": 2000.0, "test_loss": 0.5 + 0.1 * seed, "accuracy": 0.9}]}
        for name in ("fine", "coarse")
        for seed in range(3)
    ]


def test_plots(tmp_path):
    from PIL import Image

    fno_width.draw(*fake_records(), tmp_path / "fno.png")
    token_budget.draw(budget_records(), tmp_path / "tokens.png")
    for name in ("fno", "tokens"):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert picture.shape[1] > picture.shape[0] > 300
        assert (picture < 200).mean() > 0.005


SMALL = (("batch_size", 8), ("model.depths", (1, 1)), ("model.hidden_size", 32), ("model.time_embedding", "sinusoidal"))
FLOW = Recipe("digits", 3, changes=SMALL)


def flow_map_point(draw, seed):
    values = {"fd": 4.0 + seed, "precision": 0.5, "recall": 0.6, "accuracy": 0.9}
    return {"solver": draw.solver, "evaluations": draw.evaluations, "scale": draw.scale, "guide": draw.guide,
            "one_pass": draw.one_pass, "gmacs_an_image": 0.01, **values}  # fmt: skip


@pytest.mark.parametrize("part", flow_map.PARTS)
def test_every_part_of_the_flow_map_study_has_models_that_differ(part):
    study = flow_map.PARTS[part](Recipe("digits", 800), 400)
    assert len({recipe.digest() for recipe, _ in study.values()}) == len(study)
    for recipe, draws in study.values():
        assert draws
        resolve(recipe.config(""))
        assert recipe.digest() != Recipe("digits", 800).digest() or recipe == Recipe("digits", 800)
    runs = list(flow_map.settings(part, study, 2, 100))
    assert len(runs) == 2 * len(study)
    records = [one | {"steps": 1, "training_gmacs": 5.0, "points": [flow_map_point(draw, one["seed"]) for draw in
               study[one["model"]][1]]} for one in runs]  # fmt: skip
    table = flow_map.as_table(records)
    assert table.count("| 4.50 ± 0.71 | 0.50 ± 0.00 | 0.60 ± 0.00 | 0.900 ± 0.000 |") == sum(
        len(draws) for _, draws in study.values()
    )


@pytest.mark.slow
def test_flow_maps_are_trained_from_stored_flow_models_and_measured(tmp_path, monkeypatch):
    """A map that takes the guidance scale starts from the flow model; an interrupted study trains neither again."""
    zoo = Zoo(tmp_path, "")
    changes = (*FLOW.changes, flow_map.MAP, ("model.guidance_max", 4.0))
    trained = Recipe("digits", 2, FLOW, changes)
    draws = [flow_map.Draw("flow_map", 1, 2.0, one_pass=True)]
    judged = []

    def judge(images, labels):
        judged.append(images.shape)
        return {"fd": 1.0}

    one = {"model": "map", "seed": 0, "samples": 12}
    found = flow_map.measure(one, {"map": (trained, draws)}, zoo, lambda: judge)
    assert judged == [(12, 8, 8, 1)]
    macs = count_macs(zoo.model(trained, 0).config)
    assert [point["gmacs_an_image"] for point in found["points"]] == [round(macs / 1e9, 4)]
    flow_macs = count_macs(zoo.model(FLOW, 0).config)
    assert found["training_gmacs"] == round((3 * 3 * flow_macs + 2 * 5.5 * macs) * 8 / 1e9, 1)
    assert len(list(tmp_path.glob("*.npz"))) == 2
    monkeypatch.setattr("studies.flow_map_models.make_trainer", None)
    assert zoo.parameters(trained, 0).keys() - zoo.parameters(FLOW, 0).keys() == {
        "guidance_embedding.linear.bias", "guidance_embedding.linear.kernel",
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_time_of_arrival_enters(kind):
    """At r = t every kind is the flow model, and elsewhere they differ from the map that is split at the boundary."""
    structure = make_trainer(Recipe("digits", 3, None, (*FLOW.changes, flow_map.MAP), kind), "").structure
    random = np.random.default_rng(0)
    plain = make_trainer(Recipe("digits", 3, None, (*FLOW.changes, flow_map.MAP)), "")
    parameters = {
        name: 0.1 * random.standard_normal(leaf.shape, np.float32) for name, leaf in abstract(plain.model)[1].items()
    }
    model, boundary = (merge(one, parameters) for one in (structure, plain.structure))
    x, t, y = jnp.asarray(random.standard_normal((2, 8, 8, 1), np.float32)), jnp.array([0.9, 0.5]), jnp.arange(2)
    np.testing.assert_allclose(model(x, t, y, t), boundary(x, t, y), rtol=0, atol=1e-5)
    jump, other = model(x, t, y, t / 2), boundary(x, t, y, t / 2)
    assert (np.abs(jump - other).max() < 1e-6) == (kind == "boundary")


def test_passes_of_a_training_step():
    assert [passes_per_step("flow_matching"), passes_per_step("flow_map"), passes_per_step("flow_map", True)] == [
        3,
        3.5,
        5.5,
    ]


def test_both_train_steps_are_timed(tmp_path, monkeypatch):
    """The ratios are those of the median seconds and of the compiled peaks."""
    made = []

    def trainer(recipe, path):
        made.append(recipe)
        seconds, config = 0.02 * len(made), resolve(recipe.config(path))
        source = SimpleNamespace(batch=lambda rows: {"y": rows})
        return SimpleNamespace(
            config=config, source=source, first_state=lambda seed: seed, update=lambda state, batch: time.sleep(seconds)
        )

    monkeypatch.setattr(flow_map, "make_trainer", trainer)
    monkeypatch.setattr(flow_map, "compile_step", lambda config, mesh: SimpleNamespace(peak=100 * len(made)))
    found = flow_map._measure_cost(FLOW, Zoo(tmp_path, ""), turns=1)({})
    assert [recipe.config("").objective for recipe in made] == ["flow_matching", "flow_map"]
    assert found["seconds_ratio"] == pytest.approx(found["map_seconds"] / found["flow_seconds"], rel=0.01)
    assert found["seconds_ratio"] > 1.2
    assert found["memory_ratio"] == 2.0
    assert "| 2.00 × |" in flow_map.cost_table([{"data": "digits", **found}])
