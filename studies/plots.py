"""The pictures of docs/scaling.md."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpdit_jax.errors import DataError, MissingExtraError, install_extra
from mpdit_jax.runtime.hardware import CHIPS, GIB
from studies.cost_model import IMAGES_BEYOND, CostModel, Results

_BEYOND = (512, 1024, 2048, 4096)  # chips


def draw(results: Results, models: Mapping[str, CostModel], folder: Path) -> list[Path]:
    """Memory, operations and traffic per chip against the number of chips; the files.

    Raises:
        DataError: there is no step to draw.
        MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(f"--plots needs matplotlib: {install_extra('docs')}.")
    whole = [entry for entry in results.values() if not entry["refused"]]
    if not whole:
        raise DataError("--plots: no step in the results was compiled to its end: there is nothing to draw.")
    folder.mkdir(parents=True, exist_ok=True)

    pictures: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], float]]] = {
        "memory": ("peak memory a chip, GiB", "peak", lambda entry: entry["peak"] / GIB),
        "flops": ("matrix products a chip, TFLOP", "flops", lambda entry: entry["compiled_flops"] / 1e12),
        "traffic": ("sent by a chip, GiB", "sent", lambda entry: entry["sent"] / GIB),
    }
    return [
        _draw(folder / f"scaling_{name}.png", label, whole, models, value, predicted)
        for name, (label, predicted, value) in pictures.items()
    ]


def _draw(
    path: Path,
    label: str,
    entries: list[Mapping[str, Any]],
    models: Mapping[str, CostModel],
    value: Callable[[Mapping[str, Any]], float],
    predicted: str,
) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    presets = sorted({entry["preset"] for entry in entries})
    figure, panels = pyplot.subplots(
        1, len(presets), figsize=(10, 4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for preset, axes in zip(presets, panels[0], strict=True):
        own = [entry for entry in entries if entry["preset"] == preset]
        axes.plot([entry["chips"] for entry in own], [value(entry) for entry in own], "o")
        for chips, height, batches in _labels([(entry["chips"], value(entry), entry["batch_size"]) for entry in own]):
            above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(batches, (chips, height), fontsize=7, **above)
        if preset in models:
            scale = 1e12 if predicted == "flops" else GIB
            beyond = [models[preset].predict(n, IMAGES_BEYOND * n, CHIPS["v5e"])[predicted] / scale for n in _BEYOND]
            axes.plot(_BEYOND, beyond, "--", color="C0")
        axes.set(yscale="log", xlabel="TPU v5e chips", title=preset)
        axes.set_xscale("log", base=2)
        axes.margins(y=0.2)  # room for labels
    panels[0][0].set_ylabel(label)
    figure.suptitle("points: compiled, with their batch; dashes: cost model at 4 images a chip", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _labels(points: list[tuple[int, float, int]]) -> list[tuple[int, float, str]]:
    """Batches beside their points (chips, value, batch): those of points that lie on each other in one."""
    labels: list[tuple[int, float, str]] = []
    for chips, height, batch in sorted(points):
        if labels and labels[-1][0] == chips and height < 1.1 * labels[-1][1]:
            labels[-1] = (chips, height, f"{batch}\n{labels[-1][2]}")
        else:
            labels.append((chips, height, str(batch)))
    return labels
