"""What compiled steps say about those that were not compiled: six numbers a model, fitted and extrapolated.

A chip holds its share of the state, and temporaries of which some grow with its images; it computes what its images
take; and it gathers and reduces parameters whatever the batch.

    temporaries = a + b * images a chip
    bytes sent  = c + d * images a chip + e * (data > 1: gradients are also summed over copies of the state)
    operations  = f * images a chip
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpdit_jax.chips import CHIPS, GIB, Chip

Results = Mapping[str, Mapping[str, Any]]

IMAGES_BEYOND = 4  # a chip, beyond what was compiled: the recipe's batch on 256 chips


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Fitted to the compiled steps of one preset.

    Attributes:
        arguments: bytes of the state and the batch a chip, with the state split 16 ways.
        temporaries: (a, b), bytes and bytes an image.
        sent: (c, d, e), bytes, bytes an image, bytes more where there are copies.
        flops: operations an image.
        points: compiled steps it was fitted to.
        error: the largest relative residual of temporaries, bytes sent and operations.
    """

    arguments: float
    temporaries: tuple[float, float]
    sent: tuple[float, float, float]
    flops: float
    points: int
    error: dict[str, float]

    def predict(self, chips: int, batch_size: int, chip: Chip) -> dict[str, float]:
        """A step's figures per chip on more chips than were compiled for, as `compiling.report.describe` names them."""
        images = batch_size / chips
        temporaries = self.temporaries[0] + self.temporaries[1] * images
        flops, sent = self.flops * images, self.sent[0] + self.sent[1] * images + self.sent[2]
        return {
            "peak": self.arguments + temporaries,
            "flops": flops,
            "sent": sent,
            "bound_seconds": max(flops / chip.flops, sent / chip.ici_bandwidth),
        }


def fit(results: Results) -> dict[str, CostModel]:
    """A model of each preset that has steps enough: three compiled to their end, of the same split of the state."""
    models = {}
    for preset in sorted({entry["preset"] for entry in results.values()}):
        entries = [entry for entry in results.values() if entry["preset"] == preset and not entry["refused"]]
        entries = [entry for entry in entries if entry["fsdp"] == 16]
        if len(entries) >= 3:
            models[preset] = _fit(entries)
    return models


def _fit(entries: list[Mapping[str, Any]]) -> CostModel:
    images = np.array([entry["batch_size"] / entry["chips"] for entry in entries])
    copies = np.array([float(entry["data"] > 1) for entry in entries])
    one = np.ones(len(entries))
    temporaries = np.array([entry["temporaries"] for entry in entries], float)
    sent = np.array([entry["sent"] for entry in entries])
    flops = np.array([entry["compiled_flops"] for entry in entries], float)
    ab = np.linalg.lstsq(np.stack([one, images], axis=1), temporaries, rcond=None)[0]
    cde = np.linalg.lstsq(np.stack([one, images, copies], axis=1), sent, rcond=None)[0]
    an_image = float((flops / images).mean())

    def worst(found: np.ndarray, expected: np.ndarray) -> float:
        return float(np.abs(found / expected - 1).max())

    return CostModel(
        arguments=float(np.median([entry["arguments"] for entry in entries])),
        temporaries=(float(ab[0]), float(ab[1])),
        sent=(float(cde[0]), float(cde[1]), float(cde[2])),
        flops=an_image,
        points=len(entries),
        error={
            "temporaries": worst(ab[0] + ab[1] * images, temporaries),
            "bytes sent": worst(cde[0] + cde[1] * images + cde[2] * copies, sent),
            "operations": worst(an_image * images, flops),
        },
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
        errors = ", ".join(f"{name} {error:.1%}" for name, error in model.error.items())
        lines.append(f"- {preset}: fitted to {model.points} steps; largest residuals: {errors}.")
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
