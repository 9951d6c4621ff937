"""Evaluate samples of a run for several settings of the sampler."""

import argparse
import copy
import dataclasses
import glob
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax

from mpdit_jax.data.image_sets import count_labels
from mpdit_jax.data.info import read_dataset_info
from mpdit_jax.distributed.collectives import any_process, run_on_process_0
from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.compute import compute_statistics, kept, needed
from mpdit_jax.evaluate.drawn_images import DrawnImages
from mpdit_jax.evaluate.extractors import Extractor
from mpdit_jax.evaluate.report import Result, make_result, write_json
from mpdit_jax.evaluate.statistics import Statistics, check_count
from mpdit_jax.flow.adaptive import METHODS
from mpdit_jax.io.atomic import remove_stale_tmp
from mpdit_jax.io.json_files import digest_of, parse_json
from mpdit_jax.sample.command import load_drawing, run_settings
from mpdit_jax.sample.drawing import Decode, Drawing
from mpdit_jax.sample.options import reject_unused_flags, sampler_from
from mpdit_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run that is loaded and checked, ready to draw."""

    rows: list[tuple[argparse.Namespace, Drawing]]  # one for every combination of solver, steps and guidance scale
    shape: tuple[int, int, int]  # (H, W, C) of the samples


def prepare_run(options: argparse.Namespace, extractor: Extractor, metrics: Sequence[str]) -> PreparedRun:
    """Load a run and check the options, before hours of computing a reference.

    Raises:
        CheckpointError, InputError, ConfigError: no run or checkpoint, bad settings, or images of another shape.
    """
    samplers = [sampler_from(one) for one in _combinations(options)]
    drawing = load_drawing(options, samplers[0])
    reject_unused_flags(options)
    check_count(len(drawing), metrics, options.k, "samples")
    shape = _shape((min(options.batch_size, len(drawing)), *drawing.model.input_shape), drawing.decode)
    if extractor.image_shape not in (None, shape):
        raise InputError(
            f"the run draws images {shape} and this classifier was trained on {extractor.image_shape} (height, width, "
            "channels): train one on images of that size."
        )
    drawings = [dataclasses.replace(drawing, sampler=sampler) for sampler in samplers]
    for one in drawings:
        one.check()
    return PreparedRun(list(zip(_combinations(options), drawings, strict=True)), shape)


def evaluate_run(
    options: argparse.Namespace,
    run: PreparedRun,
    extractor: Extractor,
    metrics: Sequence[str],
    reference: Statistics,
    scratch: Path,
) -> list[Result]:
    """Draw and compare samples, a row for every combination of solver, steps and guidance scale. Collective.

    Finished rows are stored beside `scratch`, and the same command of the same version reads them again. Raises
    InputError if the model gives NaN or Inf, or a stored row is damaged.
    """
    info, first = read_dataset_info(options.workdir), run.rows[0][1]
    more = {
        "checkpoint": options.step,
        "ema": not options.no_ema,
        "precision": options.precision or first.model.config.dtype,
        "vae_fingerprint": info.latents.vae_fingerprint if info is not None and info.latents is not None else None,
        "label_scheme": options.labels,
        "label_counts": count_labels(first.labels),
    }
    say: Callable[[str], None] = print if jax.process_index() == 0 else lambda text: None
    results = []
    for chosen, drawing in run.rows:
        drawn = run_settings(chosen, drawing) | more
        name = _row_name(options.step, chosen)
        known = [reference.about, reference.file]
        decides = [drawn, extractor.fingerprint, known, sorted(metrics), options.k, options.splits, __version__]
        file = scratch.parent / f"{name.replace(', ', '_').replace(' ', '')}_{digest_of(decides)}.json"
        # Process 0 decides: the others may see the file later.
        if any_process(jax.process_index() == 0 and file.is_file()):
            row = run_on_process_0(partial(_read_row, name, file))
            results += [] if row is None else [row]
            say(f"{name}: done before, in {file}")
            continue
        say(name)
        run_on_process_0(partial(remove_stale_tmp, file.parent, glob.escape(file.name)))
        about = {"path": str(Path(options.workdir)), "shape": list(run.shape), **drawn}
        statistics = compute_statistics(
            extractor,
            DrawnImages(drawing, run.shape, about),
            needed(metrics),
            kept(metrics),
            "drawing samples:",
            batch_size=options.batch_size,
            block_size=options.batch_size,  # small blocks: drawing takes long
            scratch=scratch,
        )
        result = make_result(name, reference, statistics, metrics, options, extractor, drawn)
        if jax.process_index() == 0:
            write_json(file, {"metrics": result.metrics, "settings": result.settings})
        results.append(result)
    return results


def _shape(latents: tuple[int, ...], decode: Decode | None) -> tuple[int, int, int]:
    """Return (H, W, C) of images drawn from latents (n, h, w, c), found by decoding a full batch of zeros."""
    drawn = latents if decode is None else decode(jax.numpy.zeros(latents)).shape
    height, width, channels = drawn[1:]
    return height, width, channels


def _read_row(name: str, file: Path) -> Result:
    try:
        stored = parse_json(file.read_text())
        return Result(name, dict(stored["metrics"]), dict(stored["settings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}): delete that file and repeat the command.") from error


def _combinations(options: argparse.Namespace) -> list[argparse.Namespace]:
    chosen = []
    for solver in options.solver:
        adaptive = solver in METHODS  # adaptive solvers choose their steps
        for steps in [None] if adaptive else options.steps or [250]:
            for scale in options.guidance_scale:
                one = copy.copy(options)
                one.solver, one.steps, one.guidance_scale, one.png_folder = solver, steps, scale, ""
                chosen.append(one)
    return chosen


def _row_name(step: int, options: argparse.Namespace) -> str:
    count = f" {options.steps}" if options.steps else ""
    return f"step {step}, {options.solver}{count}, w={options.guidance_scale:g}"
