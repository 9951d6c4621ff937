"""Results of evaluations with their settings, as a table and as JSON."""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.bias import describe_bias
from mpdit_jax.evaluate.extractors import Extractor
from mpdit_jax.evaluate.statistics import KID_SUBSETS, Statistics, check_same_size, compare, kid_subset_size
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.version import __version__


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
    """Compare two sets, warn of too few images, and list every setting that changes a metric; null if unused.

    Raises:
        InputError: images of two sizes, missing statistics, or a metric that is not finite.
    """
    check_same_size(reference.about, statistics.about)
    notes, perfect = describe_bias(reference, statistics.count, metrics)
    if jax.process_index() == 0:
        print("".join(f"warning: {note}\n" for note in notes), end="")
    found = compare(reference, statistics, metrics, k=options.k, splits=options.splits, seed=options.seed)
    for label, value in found.items():
        if not math.isfinite(value):
            raise InputError(f"{label} of {name} is {value}: the features are too large to compare; check the images.")
    asked, kid = set(metrics), None
    if "kid" in asked:
        kid = {"subsets": KID_SUBSETS, "subset_size": kid_subset_size(reference, statistics)}
    settings = {
        "extractor": {"name": extractor.name, "fingerprint": extractor.fingerprint, **extractor.settings},
        "samples": _describe(statistics),
        "reference": _describe(reference) if asked != {"is"} else None,
        "k": options.k if asked & {"precision", "recall"} else None,
        "splits": min(options.splits, statistics.count) if "is" in asked else None,
        "kid": kid,
        "seed": options.seed,
        "version": __version__,
        "jax": jax.__version__,
        "platform": jax.devices()[0].platform,
    }
    if perfect:
        settings["distance_of_a_perfect_model"] = perfect
    if drawn:
        settings["sampler"] = drawn
    return Result(name, found, settings)


def table(results: Sequence[Result]) -> str:
    """Format results as a text table with a column for each metric."""
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


def _describe(statistics: Statistics) -> dict[str, Any]:
    """Return a set's `about` with its numbers of images and of features; null for unknown or none."""
    described = {
        **statistics.about,
        "count": statistics.count or None,
        "features_count": None if statistics.features is None else len(statistics.features),
    }
    return described | ({"file": statistics.file} if statistics.file else {})


def write_json(path: Path, content: Any) -> None:
    """Write content as JSON; replaces an existing file."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if name.startswith(("precision", "recall")) or abs(value) < 1 else f"{value:.2f}"
