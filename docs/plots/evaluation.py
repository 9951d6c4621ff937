"""The plots of docs/evaluation.md (extra [docs]), from a run's metrics.jsonl and two results of the evaluate command.

python docs/plots/evaluation.py runs/digits/metrics.jsonl guidance.json steps.json
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).resolve().parents[1] / "images"
NAMES = ("FD(classifier)", "precision(classifier)", "recall(classifier)")


def over_training(path: Path) -> None:
    """Each metric against the step, a line a guidance scale."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in map(json.loads, path.read_text().splitlines()):
        for name, value in line.items():
            if found := re.fullmatch(r"eval/(.+)/guidance_(.+)", name):
                curves[found[1]][f"w = {found[2]}"].append((line["step"], value))
    draw({name: curves[name] for name in NAMES}, "step", "evaluation_training.png", log=("FD(classifier)",))


def over_settings(path: Path, setting: str, target: str, *, log_axis: bool = False) -> None:
    """Each metric against a setting of the sampler, a line a solver."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in json.loads(path.read_text())["results"]:
        solver = re.split(r"[ ,]+", row["name"])[2]
        for name in NAMES:
            curves[name][solver].append((row["settings"]["sampler"][setting], row["metrics"][name]))
    draw(curves, setting.replace("_", " "), target, log_axis=log_axis)


def draw(curves, axis: str, target: str, *, log: tuple[str, ...] = (), log_axis: bool = False) -> None:
    """One panel a metric, into docs/images."""
    figure, panels = plt.subplots(1, len(curves), figsize=(11, 3.2), layout="constrained")
    for panel, (metric, lines) in zip(panels, curves.items(), strict=True):
        for label, points in lines.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3.5, label=label)
        panel.set(title=metric, xlabel=axis)
        if metric in log:
            panel.set_yscale("log")
        if log_axis:
            panel.set_xscale("log")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(IMAGES / target, dpi=110)


if __name__ == "__main__":
    metrics, guidance, steps = map(Path, sys.argv[1:4])
    over_training(metrics)
    over_settings(guidance, "guidance_scale", "evaluation_guidance.png")
    over_settings(steps, "steps", "evaluation_steps.png", log_axis=True)
