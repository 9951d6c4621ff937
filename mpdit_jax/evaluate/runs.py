"""Drawing from a run and looking at what was drawn, for several settings of the sampler."""

import argparse
import copy
import dataclasses
import glob
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpdit_jax.checkpoint.load import load_together
from mpdit_jax.data.info import read_dataset_info
from mpdit_jax.distributed.collectives import any_process, run_on_process_0
from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.agreement import name_of_first
from mpdit_jax.evaluate.compute import compute_statistics, kept, needed
from mpdit_jax.evaluate.extractors import Extractor, check_images
from mpdit_jax.evaluate.report import Result, make_result, write_json
from mpdit_jax.evaluate.sets import count_labels
from mpdit_jax.evaluate.statistics import Statistics, check_count
from mpdit_jax.flow.adaptive import METHODS
from mpdit_jax.io.files import digest_of, parse_json, remove_stale_tmp
from mpdit_jax.sample.blocks import Block, BlockFolder
from mpdit_jax.sample.command import Request, parse_labels, run_settings
from mpdit_jax.sample.decoding import make_decode
from mpdit_jax.sample.options import reject_unused_flags, sampler_from
from mpdit_jax.sample.run import Decode, draw_blocks
from mpdit_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What is drawn from a run, checked and ready."""

    requests: list[Request]  # one for every combination of solver, steps and guidance scale
    model: Any
    labels: np.ndarray  # int (n,), of each sample
    decode: Decode | None
    shape: tuple[int, int, int]  # (H, W, C) of each


def prepare_run(options: argparse.Namespace, extractor: Extractor, metrics: Sequence[str]) -> Drawing:
    """Load a run and check all that is asked of it: before hours of looking at a reference.

    Raises:
        CheckpointError, InputError, ConfigError: no such run or checkpoint, impossible settings, or images that the
            extractor cannot look at.
    """
    options.step, model = load_together(Path(options.workdir), options.step, ema=not options.no_ema)
    decode = make_decode(options.workdir, options.vae, options.vae_dtype, options.vae_tile)
    guide = load_together(options.guide)[1] if options.guide else None
    labels = parse_labels(options.labels, options.num_samples, model.num_classes, options.seed)
    requests = [
        Request(chosen, sampler_from(chosen), model, guide, labels, decode) for chosen in _combinations(options)
    ]
    reject_unused_flags(options)
    check_count(len(labels), metrics, options.k, "samples")
    shape = _shape((min(options.batch_size, len(labels)), *model.input_shape), decode)
    check_images(np.zeros((1, *shape), np.uint8))
    if extractor.image_shape not in (None, shape):
        raise InputError(
            f"the run draws images {shape} and this classifier was trained on {extractor.image_shape} (height, width, "
            "channels): train one on images of that size."
        )
    return Drawing(requests, model, labels, decode, shape)


def evaluate_run(
    options: argparse.Namespace,
    drawing: Drawing,
    extractor: Extractor,
    metrics: Sequence[str],
    reference: Statistics,
    scratch: Path,
) -> list[Result]:
    """Draw, decode and compare for every combination of solver, steps and guidance scale: a row each.

    A row that is finished is kept in a file beside `scratch`, and read from there when the same version repeats the
    command, by process 0 alone.

    Raises:
        InputError: the model gives NaN or Inf, or a damaged file.
    """
    workdir, model, labels = Path(options.workdir), drawing.model, drawing.labels
    facts = read_dataset_info(workdir)
    more = {
        "checkpoint": options.step,
        "ema": not options.no_ema,
        "precision": options.precision or model.config.dtype,
        "vae_fingerprint": facts.latents.vae_fingerprint if facts is not None and facts.latents is not None else None,
        "label_scheme": options.labels,
        "label_counts": count_labels(labels),
    }
    say: Callable[[str], None] = print if jax.process_index() == 0 else lambda text: None
    results = []
    for request in drawing.requests:
        settings = run_settings(request)
        drawn = settings | more
        name = _name(options.step, request.options)
        known = [reference.about, reference.file]
        decides = [drawn, extractor.fingerprint, known, sorted(metrics), options.k, options.splits, __version__]
        file = scratch.parent / f"{name.replace(', ', '_').replace(' ', '')}_{digest_of(decides)}.json"
        # One process decides, for the others may see the file later.
        if any_process(jax.process_index() == 0 and file.is_file()):
            row = run_on_process_0(partial(_read_row, name, file))
            results += [] if row is None else [row]
            say(f"{name}: done before, in {file}")
            continue
        say(name)
        run_on_process_0(partial(remove_stale_tmp, file.parent, glob.escape(file.name)))
        with BlockFolder(scratch / f"samples_{name_of_first(digest_of(drawn))}", settings) as folder:
            draw_blocks(
                request.sampler,
                model,
                labels,
                options.seed,
                folder,
                options.batch_size,
                decode=drawing.decode,
                **request.call(),
            )
            about = {"path": str(workdir), "shape": list(drawing.shape), **drawn}
            samples = DrawnImages(folder, options.batch_size, len(labels), about)
            statistics = compute_statistics(
                extractor, samples, needed(metrics), kept(metrics), scratch, "looking at samples:"
            )
            result = make_result(name, reference, statistics, metrics, options, extractor, drawn)
            if jax.process_index() == 0:
                write_json(file, {"metrics": result.metrics, "settings": result.settings})
                folder.remove()
        results.append(result)
    return results


def _shape(latents: tuple[int, ...], decode: Decode | None) -> tuple[int, int, int]:
    """(H, W, C) of what is drawn from latents (n, h, w, c): by decoding zeros, as many as later at a time."""
    drawn = latents if decode is None else decode(jax.numpy.zeros(latents)).shape
    height, width, channels = drawn[1:]
    return height, width, channels


class DrawnImages:
    """The images of finished blocks, as a set to look at; those that hold NaN or Inf are an error here."""

    def __init__(self, folder: BlockFolder, size: int, count: int, about: dict[str, Any]) -> None:
        """`count` images in blocks of `size`."""
        self._folder, self._size, self._count, self.about = folder, size, count, about
        # A file is read and checked as a whole, and an extractor on a CPU asks for a few of its images at a time.
        self._last = 0, folder.read(0)
        height, width, channels = self._last[1].images.shape[1:]
        self.shape = (height, width, channels)

    def __len__(self) -> int:
        return self._count

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, C).

        Raises:
            InputError: the model gave NaN or Inf.
        """
        found = np.empty((len(indices), *self.shape), np.uint8)
        for number in np.unique(indices // self._size):
            block, rows = self._block(int(number)), np.flatnonzero(indices // self._size == number)
            inside = indices[rows] - number * self._size
            if not block.finite[inside].all():
                bad = indices[rows][~block.finite[inside]][0]
                raise InputError(
                    f"image {bad} that the model drew holds NaN or Inf: it has diverged, or --steps is low."
                )
            found[rows] = block.images[inside]
        return found

    def _block(self, number: int) -> Block:
        if number != self._last[0]:
            self._last = number, self._folder.read(number)
        return self._last[1]


def _read_row(name: str, file: Path) -> Result:
    try:
        stored = parse_json(file.read_text())
        return Result(name, dict(stored["metrics"]), dict(stored["settings"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}): delete that file and repeat the command.") from error


def _combinations(options: argparse.Namespace) -> list[argparse.Namespace]:
    chosen = []
    for solver in options.solver:
        adaptive = solver in METHODS  # these choose their steps themselves
        for steps in [None] if adaptive else options.steps or [250]:
            for scale in options.guidance_scale:
                one = copy.copy(options)
                one.solver, one.steps, one.guidance_scale, one.png_folder = solver, steps, scale, ""
                chosen.append(one)
    return chosen


def _name(step: int, options: argparse.Namespace) -> str:
    count = f" {options.steps}" if options.steps else ""
    return f"step {step}, {options.solver}{count}, w={options.guidance_scale:g}"
