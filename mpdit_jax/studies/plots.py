"""The pictures of docs/scaling.md."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpdit_jax.chips import CHIPS, GIB
from mpdit_jax.errors import MissingExtraError
from mpdit_jax.studies.cost_model import IMAGES_BEYOND, CostModel, Results

_BEYOND = (512, 1024, 2048, 4096)  # chips


def draw(results: Results, models: Mapping[str, CostModel], folder: Path) -> list[Path]:
    """Memory, operations and traffic per chip against the number of chips; the files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("--plots needs matplotlib: pip install 'mpdit_jax[docs]'.")
    folder.mkdir(parents=True, exist_ok=True)
    whole = [entry for entry in results.values() if not entry["refused"]]

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

    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for color, preset in enumerate(sorted({entry["preset"] for entry in entries})):
        own = [entry for entry in entries if entry["preset"] == preset]
        axes.plot(
            [entry["chips"] for entry in own], [value(entry) for entry in own], "o", color=f"C{color}", label=preset
        )
        for entry in own:
            axes.annotate(
                f" {entry['batch_size']}", (entry["chips"], value(entry)), fontsize=7, va="center", color=f"C{color}"
            )
        if preset in models:
            scale = 1e12 if predicted == "flops" else GIB
            beyond = [models[preset].predict(n, IMAGES_BEYOND * n, CHIPS["v5e"])[predicted] / scale for n in _BEYOND]
            axes.plot(_BEYOND, beyond, "--", color=f"C{color}")
    axes.set(xscale="log", yscale="log", xlabel="TPU v5e chips", ylabel=label)
    axes.set_xscale("log", base=2)
    axes.set_title("points: compiled, with their batch; dashes: cost model at 4 images a chip", fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path
