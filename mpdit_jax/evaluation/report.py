"""Rows of metrics with the settings that make them comparable: as a table, as JSON."""

import argparse
import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mpdit_jax import __version__
from mpdit_jax.evaluation.extractors import Extractor
from mpdit_jax.evaluation.statistics import Statistics, compare, warn_of_bias
from mpdit_jax.files import replacing


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    metrics: dict[str, float]
    settings: dict[str, Any]


def make_result(
    name: str,
    reference: Statistics,
    statistics: Statistics,
    metrics: Sequence[str],
    options: argparse.Namespace,
    extractor: Extractor,
    drawn: dict[str, Any],
) -> Result:
    """Compare two sets, warn of too few samples, and note everything that changes a number.

    Raises:
        InputError: what a metric needs is not there.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bias = warn_of_bias(reference, statistics) if "fd" in metrics else None
    for warning in caught:
        if jax.process_index() == 0:
            print(f"warning: {warning.message}")
    found = compare(reference, statistics, metrics, k=options.k, splits=options.splits, seed=options.seed)
    settings = {
        "extractor": {"name": extractor.name, "fingerprint": extractor.fingerprint, **extractor.settings},
        "samples": {"count": statistics.count, **statistics.about},
        "reference": {"count": reference.count, **reference.about},
        "k": options.k,
        "splits": options.splits,
        "kid": "100 subsets of 1000 images, or of half of what there is",
        "seed": options.seed,
        "version": __version__,
        "jax": jax.__version__,
        "platform": jax.devices()[0].platform,
    }
    if bias is not None:
        settings["distance_of_a_perfect_model"] = bias
    if drawn:
        settings["sampler"] = drawn
    return Result(name, found, settings)


def table(results: Sequence[Result]) -> str:
    """The rows under their metrics' names."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    rows = [["", *names]]
    rows += [[result.name, *(_number(name, result.metrics.get(name)) for name in names)] for result in results]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def write_json(path: Path, content: Any) -> None:
    """Replace a file by this content."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if name.startswith(("precision", "recall")) or abs(value) < 1 else f"{value:.2f}"
