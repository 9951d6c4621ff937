"""A cost model of the train step, fitted to compiled steps and extrapolated to more chips.

It has six coefficients per preset; all quantities are per chip:

    temporaries = a + b * images
    bytes sent  = c + d * images + e * (1 if the state has several copies, else 0)
    operations  = f * images
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mpdit_jax.runtime.hardware import CHIPS, GIB, Chip
from studies.scaling_grid import FSDP

Results = Mapping[str, Mapping[str, Any]]

IMAGES_PER_CHIP = 4  # in predictions: the recipe's batch on 256 chips
_MIN_STEPS = 3  # the largest number of coefficients in a fit


@dataclasses.dataclass(frozen=True)
class CostModel:
    """The cost model of one preset, per chip."""

    arguments: float  # bytes of the state, split over FSDP chips, and of the batch
    results: float  # bytes of the returned state
    temporaries: tuple[float, float]  # (a, b): bytes, bytes per image
    sent: tuple[float, float, float]  # (c, d, e): bytes, bytes per image, bytes if the state has copies
    flops: float  # f: operations per image

    def predict(self, chips: int, batch_size: int, chip: Chip, copies: bool = True) -> dict[str, float]:
        """Predict a step's figures per chip, named as in `compile.report.describe`.

        Args:
            chips: number of chips.
            batch_size: images on all chips.
            chip: peak performance of a chip.
            copies: whether the state has more than one copy.
        """
        images = batch_size / chips
        temporaries = self.temporaries[0] + self.temporaries[1] * images
        flops, sent = self.flops * images, self.sent[0] + self.sent[1] * images + self.sent[2] * copies
        return {
            "temporaries": temporaries,
            "peak": self.arguments + temporaries,
            "flops": flops,
            "sent": sent,
            "bound_seconds": max(chip.bounds(flops, self.arguments + self.results, sent).values()),
        }

    def errors(self, entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Return the largest relative error of each predicted quantity over compiled steps."""
        errors = {"temporaries": 0.0, "bytes sent": 0.0, "operations": 0.0}
        for entry in entries:
            prediction = self.predict(entry["chips"], entry["batch_size"], CHIPS["v5e"], entry["data"] > 1)
            for name, predicted, compiled in (
                ("temporaries", "temporaries", "temporaries"),
                ("bytes sent", "sent", "sent"),
                ("operations", "flops", "compiled_flops"),
            ):
                errors[name] = max(errors[name], abs(prediction[predicted] / entry[compiled] - 1))
        return errors


def fit(results: Results) -> dict[str, CostModel]:
    """Fit a cost model to each preset with enough compiled steps."""
    presets = sorted({entry["preset"] for entry in results.values()})
    return {preset: _fit(steps) for preset in presets if len(steps := fitted(results, preset)) >= _MIN_STEPS}


def fitted(results: Results, preset: str) -> list[Mapping[str, Any]]:
    """Return the steps that a model is fitted to: compiled completely, with the state split over FSDP chips."""
    return [
        entry
        for entry in results.values()
        if entry["preset"] == preset and not entry["refused"] and entry["fsdp"] == FSDP
    ]


def extrapolation_errors(results: Results, preset: str) -> tuple[int, dict[str, float]] | None:
    """Fit a model without the largest slice; return that slice's chips and the model's errors on it.

    If the smaller slices have too few steps for a fit, return None.
    """
    steps = fitted(results, preset)
    largest = max(entry["chips"] for entry in steps)
    smaller = [entry for entry in steps if entry["chips"] < largest]
    if len(smaller) < _MIN_STEPS:
        return None
    return largest, _fit(smaller).errors(entry for entry in steps if entry["chips"] == largest)


def _fit(steps: list[Mapping[str, Any]]) -> CostModel:
    images = np.array([entry["batch_size"] / entry["chips"] for entry in steps])
    copies = np.array([float(entry["data"] > 1) for entry in steps])
    one = np.ones(len(steps))

    def column(name: str) -> np.ndarray:
        return np.array([entry[name] for entry in steps], float)

    def coefficients(name: str, *terms: np.ndarray) -> list[float]:
        """Fit by relative error, because predictions are for few images per chip, the smallest values."""
        matrix = np.stack(terms, axis=1) / column(name)[:, None]
        return list(map(float, np.linalg.lstsq(matrix, one, rcond=None)[0]))

    a, b = coefficients("temporaries", one, images)
    c, d, e = coefficients("sent", one, images, copies)
    return CostModel(
        arguments=float(np.median(column("arguments"))),
        results=float(np.median(column("results"))),
        temporaries=(a, b),
        sent=(c, d, e),
        flops=float((column("compiled_flops") / images).mean()),
    )


def flops_spread(results: Results, preset: str) -> float:
    """Return the ratio, less 1, of the largest to the smallest number of operations per image on all chips."""
    values = [
        entry["compiled_flops"] * entry["chips"] / entry["batch_size"]
        for entry in results.values()
        if entry["preset"] == preset and not entry["refused"]
    ]
    return max(values) / min(values) - 1 if values else 0.0


def table(results: Results, models: Mapping[str, CostModel]) -> str:
    """Format the results, the errors of the fits and the predictions as Markdown."""
    lines = [
        "| model | chips | batch | state + batch, GiB | temporaries, GiB | fits 15.75 GiB | TFLOP a chip, compiled "
        "| × chips, PFLOP | over analytic | sent, GiB | bound, ms | by |",
        "|" + "---|" * 12,
    ]
    for entry in sorted(results.values(), key=lambda entry: (entry["preset"], entry["chips"], entry["batch_size"])):
        start = f"| {entry['preset']} | {entry['chips']} | {entry['batch_size']} | {entry['arguments'] / GIB:.2f} "
        if entry["refused"]:
            lines.append(f"{start}| {entry['temporaries'] / GIB:.1f}, estimated | no | | | | | | |")
            continue
        flops = entry["compiled_flops"]
        lines.append(
            f"{start}| {entry['temporaries'] / GIB:.2f} | {'yes' if entry['fits'] else 'no'} | {flops / 1e12:.3f} "
            f"| {flops * entry['chips'] / 1e15:.4f} | {flops / entry['flops']:.4f} "
            f"| {entry['sent'] / GIB:.2f} | {1e3 * entry['bound_seconds']:.1f} "
            f"| {entry['bound_by']} |"
        )
    lines.append("")
    for preset in sorted({entry["preset"] for entry in results.values()}):
        lines.append(
            f"- {preset}: operations times chips over the batch are {flops_spread(results, preset):.2%} apart."
        )
    for preset, model in models.items():
        steps = fitted(results, preset)
        lines.append(f"- {preset}: fitted to {len(steps)} steps; largest residuals: {_as_text(model.errors(steps))}.")
        if extrapolation := extrapolation_errors(results, preset):
            largest, errors = extrapolation
            lines.append(
                f"- {preset}: fitted to fewer than {largest} chips alone, it misses the steps on {largest} by at most: "
                f"{_as_text(errors)}."
            )
    if models:
        lines += [
            "",
            f"Predicted figures of a chip among 512 or more, with {IMAGES_PER_CHIP} images on each:",
            "",
            "| model | peak of memory, GiB | TFLOP | sent, GiB | bound, ms |",
            "|" + "---|" * 5,
        ]
    for preset, model in models.items():
        prediction = model.predict(512, 512 * IMAGES_PER_CHIP, CHIPS["v5e"])
        lines.append(
            f"| {preset} | {prediction['peak'] / GIB:.2f} | {prediction['flops'] / 1e12:.3f} "
            f"| {prediction['sent'] / GIB:.2f} | {1e3 * prediction['bound_seconds']:.1f} |"
        )
    return "\n".join(lines)


def _as_text(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.1%}" for name, error in errors.items())
