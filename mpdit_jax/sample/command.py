"""What `python -m mpdit_jax.sample` does once its arguments are read."""

import argparse
import dataclasses
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpdit_jax.checkpoint.load import load_config
from mpdit_jax.distributed.collectives import run_on_process_0
from mpdit_jax.errors import DivergedError, InputError
from mpdit_jax.flow.inputs import check_labels
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.flow.sampler import Sampler
from mpdit_jax.io import pictures as images
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import split
from mpdit_jax.sample.blocks import Block, BlockFolder
from mpdit_jax.sample.labels import balanced_labels
from mpdit_jax.sample.names import class_names
from mpdit_jax.sample.output_paths import Places, places_of
from mpdit_jax.sample.outputs import ROWS, first_of_each, save_npz, save_pngs
from mpdit_jax.sample.run import Decode, draw_blocks, finish, unfinished_folder

_FILMED = 8  # labels in a film strip
_FRAMES = 10  # columns of a film strip
_GIF_FRAMES = 60


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked command."""

    options: argparse.Namespace
    sampler: Sampler
    model: MPDiT
    guide: MPDiT | None
    labels: np.ndarray  # int64 (N,)
    decode: Decode | None = None  # for a model of latents

    def call(self) -> dict[str, Any]:
        """More arguments of the sampler's call."""
        return {"negative_labels": self.options.negative_labels, "guide": self.guide}


def parse_labels(text: str, count: int | None, num_classes: int, seed: int) -> np.ndarray:
    """Labels int64 (count,): "balanced" as `balanced_labels`, "random" draws them, a list goes round its members.

    The first n labels of a longer run are those of a shorter one, unless a balanced one has fewer images than classes.

    Raises:
        InputError: not labels, or fewer than one image.
    """
    if text in ("balanced", "random"):
        chosen = np.arange(num_classes)
    else:
        try:
            chosen = np.array([int(part) for part in text.split(",")])
        except ValueError as error:
            raise InputError(
                f"--labels={text}: expected balanced, random, or whole numbers between commas, such as 3,5."
            ) from error
        check_labels(chosen, num_classes)
    count = 8 * len(chosen) if count is None else count
    if count < 1:
        raise InputError(f"--num_samples={count}: expected 1 or more.")
    if text == "random":
        return np.random.default_rng(seed).integers(num_classes, size=count)
    if text == "balanced":
        return balanced_labels(num_classes, count).astype(np.int64)
    return np.resize(chosen, count)


def draw(request: Request, out: Path) -> np.ndarray:
    """Draw, resume what is half done, write every output; the numbers of images that hold NaN or Inf.

    Every process returns when process 0 has written; the numbers are given to that one alone.

    Raises:
        InputError: outputs that cannot be where they are to go, or a folder of blocks that is not this run's.
        DivergedError: every image does.
    """
    options = request.options
    places = places_of(options, out)
    places.check()
    _check_rows(out, request.labels)
    names = class_names(options.workdir, load_config(options.workdir), options.class_names)
    _check(request)
    blocks = unfinished_folder(out)
    run_on_process_0(lambda: None if BlockFolder.is_begun(blocks) else places.check_fresh())

    def each(block: Block) -> None:
        if places.singles is not None:
            save_pngs(places.singles, block)

    with BlockFolder(blocks, run_settings(request)) as folder:
        run_on_process_0(places.remove_stale_tmp)  # before any process writes single images
        count = draw_blocks(
            request.sampler,
            request.model,
            request.labels,
            options.seed,
            folder,
            options.batch_size,
            decode=request.decode,
            each=each,
            **request.call(),
        )
        missing = run_on_process_0(partial(_write, request, places, names, folder, count))
    return np.array([], np.int64) if missing is None else missing


def _write(request: Request, places: Places, names: Sequence[str], folder: BlockFolder, count: int) -> np.ndarray:
    """Every output but the single images, from the finished blocks, which are then deleted; see `draw`."""
    out, sheet = places.out, places.sheet
    missing = np.concatenate([block.indices[~block.finite] for block in folder.read_all(count)])
    if len(missing) == len(request.labels):
        folder.remove()
        raise DivergedError(
            "every image holds NaN or Inf: the model has diverged, or the settings are out of its reach."
        )
    written = [str(out)]
    if out.suffix == ".npz":
        save_npz(out, lambda: folder.read_all(count))
    if out.suffix == ".png" and sheet != out:
        rows = first_of_each(folder.read_all(count), request.labels, columns=len(request.labels))
        images.save_png(out, _plain_grid(list(rows.values())))
    if sheet is not None:
        rows = first_of_each(folder.read_all(count), request.labels)
        images.save_png(sheet, images.contact_sheet([(names[label], row) for label, row in rows.items()]))
        written.append(str(sheet))
        shown, classes = sum(map(len, rows.values())), len(np.unique(request.labels))
        if shown < len(request.labels):
            print(f"{sheet} shows {shown} of {len(request.labels)} images, of {len(rows)} of {classes} classes")
    if places.film is not None and places.strip is not None:
        _save_film(request, places.film, places.strip)
        written.extend([str(places.film), str(places.strip)])
    folder.remove()
    kept = len(request.labels) - len(missing)
    single = f"; single images in {places.singles}" if places.singles is not None else ""
    print(f"{kept} images in {' and '.join(dict.fromkeys(written))}{single}")
    return missing


def _check_rows(out: Path, labels: np.ndarray) -> None:
    classes = len(np.unique(labels))
    if out.suffix == ".png" and classes > ROWS:
        raise InputError(
            f"--out={out}: a picture has a row for each of up to {ROWS} classes, and there are {classes}: give a name "
            "that ends in .npz, with --grid for a sheet of the first, or fewer --labels."
        )


def _check(request: Request) -> None:
    """Raise what the first block would raise, before a folder or a progress bar is there: a trace makes every check."""
    labels, key = request.labels[:1], seed_key(0)
    jax.eval_shape(lambda: request.sampler(request.model, labels, key, **request.call()))


def _plain_grid(rows: list[list[np.ndarray]]) -> np.ndarray:
    """One row a label; short rows end in white."""
    columns = max(len(row) for row in rows)
    blank = np.full_like(rows[0][0], 255)
    return images.grid(np.array([tile for row in rows for tile in [*row, *[blank] * (columns - len(row))]]), columns)


def _save_film(request: Request, film: Path, strip: Path) -> None:
    """The first image of each of a few labels, from noise to data: a GIF, and a strip of frames."""
    _, first = np.unique(request.labels, return_index=True)
    rows = np.sort(first)[:_FILMED]
    key = seed_key(request.options.seed)
    labels = request.labels[rows]
    solution = request.sampler.solve(request.model, labels, key, indices=rows, record=True, **request.call())
    if solution.path is None or solution.path_times is None:
        raise InputError("this solver records no path: choose another --solver for --trajectory.")
    times, states = np.asarray(solution.path_times), np.asarray(solution.path)  # (n,), (n, B, H, W, C)
    moving = np.linspace(0, len(times) - 1, min(len(times), _GIF_FRAMES)).round().astype(int).tolist()
    # Frames as near as there are to times evenly spread.
    still = [int(np.abs(times - t).argmin()) for t in np.linspace(times[0], times[-1], _FRAMES)]
    frames = {}  # only what is shown is decoded and kept: uint8 (B, H, W, C) by number
    for index in {*moving, *still}:
        picture = states[index] if request.decode is None else np.asarray(request.decode(states[index]))
        frames[index] = finish(picture, labels, rows).images
    images.save_gif(film, [images.grid(frames[index], len(rows)) for index in moving])
    pictures = images.film_strip(
        np.stack([frames[index] for index in still]), [f"{times[index]:.2f}" for index in still]
    )
    images.save_png(strip, pictures)


def run_settings(request: Request) -> dict[str, Any]:
    """What decides every pixel."""
    options, sampler = request.options, request.sampler
    return {
        "workdir": str(Path(options.workdir).resolve()),
        "checkpoint": options.step,
        "model": _fingerprint(request.model),
        "guide": _fingerprint(request.guide) if request.guide is not None else "",
        "solver": repr(sampler.settings.solver),
        "steps": sampler.settings.steps,
        "time_grid": repr(sampler.settings.time_grid),
        "guidance_scale": float(sampler.guidance_scale),
        "guidance_interval": list(sampler.settings.guidance_interval),
        "negative_labels": {str(label): negative for label, negative in sorted(options.negative_labels.items())},
        "vae": options.vae and f"{options.vae_dtype} {options.vae_tile}",
        "precision": sampler.settings.precision,
        "seed": options.seed,
        "num_samples": len(request.labels),
        "labels": hashlib.blake2b(np.asarray(request.labels, "<i8").tobytes(), digest_size=8).hexdigest(),
        "batch_size": options.batch_size,
        "png_folder": options.png_folder and str(Path(options.png_folder).resolve()),
    }


def _fingerprint(model: MPDiT) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(split(model)[1].items()):
        digest.update(name.encode())
        digest.update(np.asarray(value).tobytes())
    return digest.hexdigest()
