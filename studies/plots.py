"""Plots of docs/scaling.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdit_jax.errors import DataError
from mpdit_jax.runtime.hardware import CHIPS, GIB
from studies.cost_model import IMAGES_PER_CHIP, CostModel, Results
from studies.records import pyplot

_PREDICTED_CHIPS = (512, 1024, 2048, 4096)
# Name of the plot: label of its axis, compiled quantity, predicted quantity, unit.
_PLOTS = {
    "memory": ("peak memory a chip, GiB", "peak", "peak", GIB),
    "flops": ("matrix products a chip, TFLOP", "compiled_flops", "flops", 1e12),
    "traffic": ("sent by a chip, GiB", "sent", "sent", GIB),
}


def draw(results: Results, models: Mapping[str, CostModel], folder: Path) -> list[Path]:
    """Plot memory, operations and traffic per chip over the number of chips; return the files.

    Raises:
        DataError: no step was compiled completely.
        MissingExtraError: matplotlib is not installed.
    """
    entries = [entry for entry in results.values() if not entry["refused"]]
    if not entries:
        raise DataError("--plots: no step in the results was compiled to its end: there is nothing to draw.")
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(folder / f"scaling_{name}.png", entries, models, *plot) for name, plot in _PLOTS.items()]


def _draw(
    path: Path,
    entries: list[Mapping[str, Any]],
    models: Mapping[str, CostModel],
    label: str,
    compiled: str,
    predicted: str,
    unit: float,
) -> Path:
    plots = pyplot()
    presets = sorted({entry["preset"] for entry in entries})
    figure, panels = plots.subplots(
        1, len(presets), figsize=(10, 4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for preset, axes in zip(presets, panels[0], strict=True):
        steps = [entry for entry in entries if entry["preset"] == preset]
        points = [(entry["chips"], entry[compiled] / unit, entry["batch_size"]) for entry in steps]
        axes.plot([chips for chips, _, _ in points], [value for _, value, _ in points], "o")
        for chips, value, text in _labels(points):
            above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(text, (chips, value), fontsize=7, **above)
        if preset in models:
            predictions = [models[preset].predict(n, IMAGES_PER_CHIP * n, CHIPS["v5e"]) for n in _PREDICTED_CHIPS]
            axes.plot(_PREDICTED_CHIPS, [values[predicted] / unit for values in predictions], "--", color="C0")
        axes.set(yscale="log", xlabel="TPU v5e chips", title=preset)
        axes.set_xscale("log", base=2)
        axes.margins(y=0.2)  # room for labels
    panels[0][0].set_ylabel(label)
    figure.suptitle("points: compiled, with their batch; dashes: cost model at 4 images a chip", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plots.close(figure)
    return path


def _labels(points: list[tuple[int, float, int]]) -> list[tuple[int, float, str]]:
    """Label points (chips, value, batch) with their batch; points that nearly coincide share a label."""
    labels: list[tuple[int, float, str]] = []
    for chips, height, batch in sorted(points):
        if labels and labels[-1][0] == chips and height < 1.1 * labels[-1][1]:
            labels[-1] = (chips, height, f"{batch}\n{labels[-1][2]}")
        else:
            labels.append((chips, height, str(batch)))
    return labels
