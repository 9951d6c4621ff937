"""`python -m studies.scaling`: the train step compiled for 4 to 256 chips (docs/scaling.md).

A point takes a minute or two. It is written to the file when it is compiled, so that the same command continues after
an interruption.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpdit_jax.compile.environment import prepare
from mpdit_jax.errors import InputError
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.runtime.cli import make_parser, run
from studies.scaling_grid import FSDP, GRID, SIZES, Point

_EXAMPLES = """\
  python -m studies.scaling --out=docs/scaling.json
  python -m studies.scaling --out=docs/scaling.json --page=docs/scaling.md --plots=docs/images --no_compile
"""
BEGIN, END = "<!-- begin: python -m studies.scaling -->", "<!-- end -->"


def main(arguments: Sequence[str]) -> int:
    """Compile the points that the file lacks, print or replace the table, and plot; return the exit status."""
    parser = make_parser(
        "scaling",
        "Compile the train step of MPDiT-B, MPDiT-XL and DiT-XL/2 (bfloat16, remat dots) for v5e slices of 4 to 256 "
        "chips (extra [tpu]; no TPU is needed), fit a cost model, and draw both (extra [docs]).",
        _EXAMPLES,
        package="studies",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/scaling.json"), help="(default: %(default)s)")
    parser.add_argument("--plots", type=Path, help="folder for scaling_*.png (default: no plots)")
    parser.add_argument("--page", type=Path, help="Markdown file whose table is replaced (default: print the table)")
    parser.add_argument("--only", default="", help="compile only points whose PRESET/CHIPS/BATCH contains this text")
    parser.add_argument("--no_compile", action="store_true", help="only fit, print and plot the results in the file")
    options = parser.parse_args(arguments)
    results = read(options.out)
    if not options.no_compile:
        prepare()
        _compile_missing(options, results)
    if not results:
        raise InputError(f"--out={options.out}: no results yet; run without --no_compile.")
    from studies.cost_model import fit, table

    models = fit(results)
    if options.page is None:
        print(table(results, models))
    else:
        _replace_table(options.page, table(results, models))
    if options.plots is not None:
        from studies.plots import draw

        for path in draw(results, models, options.plots):
            print(f"drawn: {path}")
    return 0


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Read the results by `Point.name`. Raise InputError for a file of another kind."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not all({"preset", "chips", "batch_size", "results"} <= entry.keys() for entry in results.values()):
            raise ValueError("entries without preset, chips, batch_size or results")
    except (ValueError, AttributeError) as error:
        raise InputError(f"--out={path}: not a file of this command ({error}); choose another name.") from error
    return results


def _replace_table(page: Path, text: str) -> None:
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN) if page.is_file() else ("", "", "")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"--page={page}: expected the lines {BEGIN} and {END} around the table.")
    with atomic_write(page) as file:
        file.write(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())


def _compile_missing(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    missing = [point for point in GRID if point.name not in results and options.only in point.name]
    start = time.perf_counter()
    for done, point in enumerate(missing):
        seconds = (time.perf_counter() - start) / max(done, 1) * (len(missing) - done)
        remaining = f", {seconds / 60:.0f} min left" if done else ""
        print(f"{done + 1} of {len(missing)}: {point.name}{remaining} ...", file=sys.stderr, flush=True)
        results[point.name] = measure(point)
        with atomic_write(options.out) as file:
            file.write((json.dumps(results, indent=1, sort_keys=True) + "\n").encode())


def measure(point: Point) -> dict[str, Any]:
    """Compile one point; return its figures per chip. Raise MissingExtraError if libtpu is not installed."""
    from mpdit_jax.compile.programs import compile_step, topology_devices
    from mpdit_jax.compile.report import describe, step_flops
    from mpdit_jax.config import base_config, resolve
    from mpdit_jax.distributed.mesh import make_mesh
    from mpdit_jax.runtime.hardware import CHIPS

    config = base_config()
    config.batch_size = point.batch_size
    config.model.preset, config.model.dtype, config.model.remat = point.preset, "bfloat16", "dots"
    config.data.name = "latents"
    config.mesh.fsdp = min(FSDP, point.chips)
    config = resolve(config)
    mesh = make_mesh(**config.mesh, devices=topology_devices(f"v5e:{SIZES[point.chips]}"))
    report = describe(compile_step(config, mesh), step_flops(config), point.chips, CHIPS["v5e"])
    return {**dataclasses.asdict(point), "fsdp": mesh.shape["fsdp"], "data": mesh.shape["data"], **report}


if __name__ == "__main__":
    run(main)
