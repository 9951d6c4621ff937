"""What compiled steps say about those that were not compiled: six numbers a model, fitted and extrapolated.

A chip holds its share of the state, and temporaries of which some grow with its images; it computes what its images
take; and it gathers and reduces parameters whatever the batch.

    temporaries = a + b * images a chip
    bytes sent  = c + d * images a chip + e * (data > 1: the state has copies, and XLA other collectives)
    operations  = f * images a chip
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mpdit_jax.runtime.hardware import CHIPS, GIB, Chip
from studies.scaling_grid import FSDP

Results = Mapping[str, Mapping[str, Any]]

IMAGES_BEYOND = 4  # a chip, beyond what was compiled: the recipe's batch on 256 chips
_LEAST = 3  # steps: as many as a fit has terms


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Fitted to the compiled steps of one preset.

    Attributes:
        arguments: bytes of the state and the batch a chip, with the state split 16 ways.
        results: bytes of the state it returns.
        temporaries: (a, b), bytes and bytes an image.
        sent: (c, d, e), bytes, bytes an image, bytes more or less where there are copies.
        flops: operations an image.
    """

    arguments: float
    results: float
    temporaries: tuple[float, float]
    sent: tuple[float, float, float]
    flops: float

    def predict(self, chips: int, batch_size: int, chip: Chip, copies: bool = True) -> dict[str, float]:
        """A step's figures per chip, as `compiling.report.describe` names them.

        Args:
            chips: their number, which may be more than were compiled for.
            batch_size: images over all of them.
            chip: their kind.
            copies: whether there are chips enough for more than one copy of the state.
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

    def missed(self, entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """By how much compiled steps differ from the prediction at most, relative to them, for each thing predicted."""
        worst = {"temporaries": 0.0, "bytes sent": 0.0, "operations": 0.0}
        for entry in entries:
            found = self.predict(entry["chips"], entry["batch_size"], CHIPS["v5e"], entry["data"] > 1)
            for name, predicted, compiled in (
                ("temporaries", "temporaries", "temporaries"),
                ("bytes sent", "sent", "sent"),
                ("operations", "flops", "compiled_flops"),
            ):
                worst[name] = max(worst[name], abs(found[predicted] / entry[compiled] - 1))
        return worst


def fit(results: Results) -> dict[str, CostModel]:
    """A model of each preset that has steps enough to fit to."""
    presets = sorted({entry["preset"] for entry in results.values()})
    return {preset: _fit(entries) for preset in presets if len(entries := fitted(results, preset)) >= _LEAST}


def fitted(results: Results, preset: str) -> list[Mapping[str, Any]]:
    """The steps that a preset's model is fitted to: compiled to their end, of the same split of the state."""
    return [
        entry
        for entry in results.values()
        if entry["preset"] == preset and not entry["refused"] and entry["fsdp"] == FSDP
    ]


def missed_beyond(results: Results, preset: str) -> tuple[int, dict[str, float]] | None:
    """What an extrapolation is worth: the largest slice's chips, and how a model fitted to smaller ones misses it.

    None where smaller slices have too few steps to fit to.
    """
    steps = fitted(results, preset)
    most = max(entry["chips"] for entry in steps)
    smaller = [entry for entry in steps if entry["chips"] < most]
    if len(smaller) < _LEAST:
        return None
    return most, _fit(smaller).missed(entry for entry in steps if entry["chips"] == most)


def _fit(entries: list[Mapping[str, Any]]) -> CostModel:
    images = np.array([entry["batch_size"] / entry["chips"] for entry in entries])
    copies = np.array([float(entry["data"] > 1) for entry in entries])
    one = np.ones(len(entries))

    def of_all(name: str) -> np.ndarray:
        return np.array([entry[name] for entry in entries], float)

    def line(name: str, *terms: np.ndarray) -> list[float]:
        """Coefficients with the least relative error: what is predicted are steps of few images, the smallest."""
        values = of_all(name)
        found: list[float] = np.linalg.lstsq(np.stack(terms, axis=1) / values[:, None], one, rcond=None)[0].tolist()
        return found

    a, b = line("temporaries", one, images)
    c, d, e = line("sent", one, images, copies)
    return CostModel(
        arguments=float(np.median(of_all("arguments"))),
        results=float(np.median(of_all("results"))),
        temporaries=(a, b),
        sent=(c, d, e),
        flops=float((of_all("compiled_flops") / images).mean()),
    )


def flops_spread(results: Results, preset: str) -> float:
    """How far per-chip operations times chips, over the batch, are apart: the largest over the smallest, less 1."""
    values = [
        entry["compiled_flops"] * entry["chips"] / entry["batch_size"]
        for entry in results.values()
        if entry["preset"] == preset and not entry["refused"]
    ]
    return max(values) / min(values) - 1 if values else 0.0


def table(results: Results, models: Mapping[str, CostModel]) -> str:
    """Everything as a Markdown table, then what was fitted."""
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
        lines.append(f"- {preset}: fitted to {len(steps)} steps; largest residuals: {_as_text(model.missed(steps))}.")
        if beyond := missed_beyond(results, preset):
            most, errors = beyond
            lines.append(
                f"- {preset}: fitted to fewer than {most} chips alone, it misses the steps on {most} by at most: "
                f"{_as_text(errors)}."
            )
    if models:
        lines += [
            "",
            f"By the fit, of 512 chips or more, each with {IMAGES_BEYOND} images of a batch, one needs and sends:",
            "",
            "| model | peak of memory, GiB | TFLOP | sent, GiB | bound, ms |",
            "|" + "---|" * 5,
        ]
    for preset, model in models.items():
        found = model.predict(512, 512 * IMAGES_BEYOND, CHIPS["v5e"])
        lines.append(
            f"| {preset} | {found['peak'] / GIB:.2f} | {found['flops'] / 1e12:.3f} | {found['sent'] / GIB:.2f} "
            f"| {1e3 * found['bound_seconds']:.1f} |"
        )
    return "\n".join(lines)


def _as_text(missed: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.1%}" for name, error in missed.items())
