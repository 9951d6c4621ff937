"""The figures of docs/evaluation.md are those of docs/results."""

import json
import re

from tests.tiny import ROOT

PAGE = " ".join((ROOT / "docs/evaluation.md").read_text().split())
RESULTS = ROOT / "docs/results"


def distances(name, setting):
    """Return FD(classifier) by solver and setting."""
    rows = json.loads((RESULTS / name).read_text())["results"]
    return {
        (re.split(r"[ ,]+", row["name"])[2], row["settings"]["sampler"][setting]): row["metrics"]["FD(classifier)"]
        for row in rows
    }


def test_over_steps():
    found = distances("evaluation_steps.json", "steps")
    for solver in ("euler", "heun"):
        assert ", ".join(f"{found[solver, steps]:.2f}" for steps in (50, 100, 250)) in PAGE
    assert f"({found['euler', 10]:.2f} against {found['heun', 10]:.2f} at 10)" in PAGE


def test_over_guidance():
    found = distances("evaluation_guidance.json", "guidance_scale")
    best, one, two, six = (found["euler", scale] for scale in (1.5, 1.0, 2.0, 6.0))
    assert best == min(found.values())
    assert f"({best:.2f}; {one:.2f} at 1, {two:.1f} at 2, {six:.1f} at 6)" in PAGE


def test_over_training():
    lines = [json.loads(line) for line in (RESULTS / "evaluation_training.jsonl").read_text().splitlines()]
    plain, guided = ({line["step"]: line[f"eval/FD(classifier)/guidance_{w}"] for line in lines} for w in (1, 2))
    assert f"falls from {plain[100]:.0f} at step 100 to {plain[800]:.1f} at step 800" in PAGE
    assert f"500 ({guided[500]:.1f} against {plain[500]:.1f})" in PAGE
