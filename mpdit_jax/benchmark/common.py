"""Parts that all benchmarks share: options, timing in turns, the report."""

import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpdit_jax.errors import InputError
from mpdit_jax.runtime.cli import Parser, make_parser


def make_benchmark_parser(
    name: str, description: str, examples: str, repeats: int, command: str = "mpdit_jax.benchmark"
) -> Parser:
    """Return the parser of `python -m COMMAND NAME`, with `--repeats` and `--format`."""
    package, _, module = command.rpartition(".")
    parser = make_parser(f"{module} {name}", description, examples, package=package)
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="turns to take the median of (default: %(default)s)"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")
    return parser


def check_at_least(options: Namespace, least: int, names: Sequence[str]) -> None:
    """Raise InputError for an option of these names below `least`."""
    for name in names:
        if vars(options)[name] < least:
            raise InputError(f"--{name}={vars(options)[name]}: expected {least} or more.")


def timed(task: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def take_turns(repeats: int, tasks: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Return the median result of each task; the tasks take turns, so that noise of the machine affects all of them."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(repeats):
        for name, task in tasks.items():
            found[name].append(task())
        progress(f"turn {turn + 1} of {repeats}")
    return {name: statistics.median(values) for name, values in found.items()}


def print_report(options: Namespace, report: Mapping[str, Any], as_text: Callable[[Mapping[str, Any]], str]) -> int:
    """Print the report in the format of the options; return exit status 0."""
    print(json.dumps(report) if options.format == "json" else as_text(report))
    return 0


def progress(text: str) -> None:
    """Print a line on stderr."""
    print(f"  {text}", file=sys.stderr, flush=True)
