"""studies.scaling resumes, its cost model fits exact data, and docs/scaling.md agrees with docs/scaling.json."""

import dataclasses
import json

import pytest

from mpdit_jax.errors import DataError, InputError
from mpdit_jax.runtime.hardware import CHIPS
from studies import plots, scaling
from studies.cost_model import extrapolation_errors, fit, fitted, flops_spread, table
from studies.scaling_grid import GRID
from tests.tiny import ROOT

PAGE = ROOT / "docs/scaling.md"
RESULTS = ROOT / "docs/scaling.json"


def entry(preset, chips, batch_size, refused=False):
    """Return the results of a step that follow the cost model exactly."""
    images, data = batch_size / chips, max(chips // 16, 1)
    sent = int(3e9 + 1e6 * images + 5e8 * (data > 1))
    temporaries = int(1e9 + 1e8 * images)
    return {
        "preset": preset, "chips": chips, "batch_size": batch_size, "fsdp": min(chips, 16), "data": data,
        "arguments": 5 * 10**8, "results": 4 * 10**8, "temporaries": temporaries, "peak": 5 * 10**8 + temporaries,
        "refused": refused,
        "compiled_flops": None if refused else int(3e11 * images), "flops": 3e11 * images,
        "sent": None if refused else sent, "fits": not refused, "hbm": CHIPS["v5e"].hbm,
        "seconds_to_compile": 1.0, "bound_seconds": 0.1, "bound_by": "links",
    }  # fmt: skip


@pytest.fixture
def results():
    shapes = [(16, 1024), (64, 1024), (256, 1024), (256, 8192), (16, 256)]
    found = {f"mpdit_b/{chips}/{batch}": entry("mpdit_b", chips, batch) for chips, batch in shapes}
    return found | {"mpdit_b/4/8192": entry("mpdit_b", 4, 8192, refused=True)}


def test_the_cost_model_is_recovered_and_extrapolates(results):
    steps = fitted(results, "mpdit_b")
    assert len(steps) == 5
    model = fit(results)["mpdit_b"]
    assert max(model.errors(steps).values()) < 1e-6
    expected = entry("mpdit_b", 1024, 4096)
    found = model.predict(1024, 4096, CHIPS["v5e"])
    assert found["peak"] == pytest.approx(expected["peak"], rel=1e-6)
    assert found["flops"] == pytest.approx(expected["compiled_flops"], rel=1e-6)
    assert found["sent"] == pytest.approx(expected["sent"], rel=1e-6)
    # With 4 images per chip, sending at 200 GB/s takes longer than the products and the memory traffic.
    assert found["bound_seconds"] == pytest.approx(expected["sent"] / 200e9, rel=1e-6)
    in_memory = dataclasses.replace(model, results=3e10).predict(1024, 4096, CHIPS["v5e"])
    assert in_memory["bound_seconds"] == pytest.approx(3.05e10 / 819e9)
    assert fit(dict(list(results.items())[:2])) == {}


def test_extrapolation_errors_on_the_largest_slice(results):
    """A step on the largest slice with twice the predicted temporaries has an error of 50 %."""
    _, errors = extrapolation_errors(results, "mpdit_b")
    assert errors["temporaries"] < 1e-6
    results["mpdit_b/256/8192"]["temporaries"] *= 2
    most, errors = extrapolation_errors(results, "mpdit_b")
    assert most == 256
    assert errors["temporaries"] == pytest.approx(0.5)
    assert errors["operations"] < 1e-6
    expected = "fitted to fewer than 256 chips alone, it misses the steps on 256 by at most: temporaries 50.0%"
    assert expected in table(results, fit(results))
    del results["mpdit_b/64/1024"]
    assert extrapolation_errors(results, "mpdit_b") is None


def test_the_table_shows_a_step_that_does_not_fit(results):
    text = table(results, fit(results))
    (row,) = [line for line in text.splitlines() if line.startswith("| mpdit_b | 4 | 8192 |")]
    assert "estimated | no |" in row
    assert flops_spread(results, "mpdit_b") < 1e-6


def test_an_interrupted_command_continues(tmp_path, monkeypatch, capsys):
    done = []

    def measure(point):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(point.name)
        return entry(point.preset, point.chips, point.batch_size)

    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(scaling, "prepare", lambda: None)  # it would change this process's environment
    out = tmp_path / "scaling.json"
    with pytest.raises(KeyboardInterrupt):
        scaling.main([f"--out={out}", "--only=mpdit_b"])
    assert list(json.loads(out.read_text())) == sorted(done)
    first, done = done, []
    monkeypatch.setattr(scaling, "measure", lambda point: done.append(point.name) or measure_plain(point))
    assert scaling.main([f"--out={out}", "--only=mpdit_b"]) == 0
    assert not set(first) & set(done)
    assert {*first, *done} == {point.name for point in GRID if point.preset == "mpdit_b"}
    assert "fitted to" in capsys.readouterr().out


def measure_plain(point):
    return entry(point.preset, point.chips, point.batch_size)


def test_the_page_gets_the_new_table(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    out = tmp_path / "scaling.json"
    out.write_text(json.dumps(results))
    assert scaling.main([f"--out={out}", "--no_compile", f"--page={page}"]) == 0
    expected = table(results, fit(results))
    assert page.read_text() == f"before\n{scaling.BEGIN}\n\n{expected}\n\n{scaling.END}\nafter\n"
    page.write_text("nothing to replace")
    with pytest.raises(InputError, match="expected the lines"):
        scaling.main([f"--out={out}", "--no_compile", f"--page={page}"])


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"a": {"b": 1}}')
    with pytest.raises(InputError, match="not a file of this command"):
        scaling.read(path)
    with pytest.raises(InputError, match="no results yet"):
        scaling.main([f"--out={tmp_path / 'none.json'}", "--no_compile"])


def test_pictures_are_drawn(results, tmp_path):
    paths = plots.draw(results, fit(results), tmp_path)
    assert [path.name for path in paths] == ["scaling_memory.png", "scaling_flops.png", "scaling_traffic.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    with pytest.raises(DataError, match="there is nothing to draw"):
        plots.draw({name: entry | {"refused": True} for name, entry in results.items()}, {}, tmp_path)


def test_points_that_lie_on_each_other_have_one_label():
    """Points within a tenth of each other share a label, the larger batch on top."""
    points = [(64, 1.0, 512), (16, 1.0, 256), (16, 1.05, 512), (16, 2.0, 1024)]
    assert plots._labels(points) == [(16, 1.05, "512\n256"), (16, 2.0, "1024"), (64, 1.0, "512")]


def test_the_page_shows_the_results_and_chips_share_the_operations():
    """The operations on all chips, per image, vary by less than 2 % over all sizes."""
    found = scaling.read(RESULTS)
    page = PAGE.read_text()
    assert table(found, fit(found)) in page
    for preset in {value["preset"] for value in found.values() if not value["refused"]}:
        assert flops_spread(found, preset) < 0.02, preset
