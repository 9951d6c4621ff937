"""Phases of `python -m mpdit_jax.sample`, after its arguments are parsed."""

import argparse
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mpdit_jax.checkpoint.load import load_config, load_together
from mpdit_jax.distributed.collectives import run_on_process_0
from mpdit_jax.distributed.mesh import make_mesh
from mpdit_jax.errors import DivergedError, InputError
from mpdit_jax.flow.sampler import Sampler
from mpdit_jax.io import pictures as images
from mpdit_jax.model.mpdit import MPDiT
from mpdit_jax.model.parameters import split
from mpdit_jax.model.trunk_drop import TailOnly
from mpdit_jax.sample.blocks import Block, BlockFolder
from mpdit_jax.sample.classes import Classes, read_classes
from mpdit_jax.sample.decoding import make_decode
from mpdit_jax.sample.drawing import Drawing, check_drawable, draw_blocks
from mpdit_jax.sample.labels import parse_labels
from mpdit_jax.sample.output_paths import OutputPaths, output_paths
from mpdit_jax.sample.outputs import ROWS, first_of_each, save_npz, save_pngs
from mpdit_jax.sample.trajectory import save_trajectory

TAIL = "tail"


def load_drawing(options: argparse.Namespace, sampler: Sampler) -> Drawing:
    """Load what the options ask to draw on this process's devices. Collective; sets `options.step`.

    Raises:
        CheckpointError, InputError: no run or checkpoint, bad labels, or a run on latents without their VAE.
    """
    decode = make_decode(options.workdir, options.vae, options.vae_dtype, options.vae_tile)
    options.step, model = load_together(options.workdir, options.step, ema=not options.no_ema)
    guide = _load_guide(options, model) if options.guide else None
    classes = read_classes(options.workdir, load_config(options.workdir), options.class_names)
    labels = parse_labels(options.labels, options.num_samples, classes, options.seed)
    negatives = classes.find_pairs(options.negative_labels, "--negative_labels")
    check_drawable(model.input_shape, decode)
    call = {"negative_labels": negatives, "guide": guide}
    mesh = make_mesh(devices=jax.local_devices())
    return Drawing(sampler, model, labels, options.seed, options.batch_size, decode, call, mesh)


def _load_guide(options: argparse.Namespace, model: MPDiT) -> nnx.Module:
    """Load the model of `--guide`, a run, or `tail` for the model's own tail."""
    if options.guide != TAIL:
        return load_together(options.guide)[1]
    if not load_config(options.workdir).trunk_drop:
        raise InputError(f"--guide={TAIL}: {options.workdir} was not trained with config.trunk_drop, such as 0.1.")
    return TailOnly(model)


def draw(options: argparse.Namespace, drawing: Drawing, out: Path) -> np.ndarray:
    """Draw all images, continuing an interrupted run, and write every output. Collective.

    Returns the numbers of images that hold NaN or Inf on process 0, and an empty array on other processes.

    Raises:
        InputError: an output that cannot be written, or a folder of blocks of another run.
        DivergedError: every image holds NaN or Inf.
    """
    paths = output_paths(options, out)
    paths.check()
    _check_rows(out, drawing.labels)
    classes = read_classes(options.workdir, load_config(options.workdir), options.class_names)
    drawing.check()
    blocks = out.with_name(f"{out.name}.unfinished")
    run_on_process_0(lambda: None if BlockFolder.is_begun(blocks) else paths.check_fresh())

    def each(block: Block) -> None:
        if paths.singles is not None:
            save_pngs(paths.singles, block)

    with BlockFolder(blocks, run_settings(options, drawing)) as folder:
        run_on_process_0(paths.remove_stale_tmp)  # before any process writes single images
        count = draw_blocks(drawing, folder, each)
        missing = run_on_process_0(partial(_write, drawing, paths, classes, folder, count))
    return np.array([], np.int64) if missing is None else missing


def _write(drawing: Drawing, paths: OutputPaths, classes: Classes, folder: BlockFolder, count: int) -> np.ndarray:
    """Write every output except single images from the finished blocks, then delete the blocks; see `draw`."""
    out, sheet, labels = paths.out, paths.sheet, drawing.labels
    missing = np.concatenate([block.indices[~block.finite] for block in folder.read_all(count)])
    if len(missing) == len(labels):
        folder.remove()
        raise DivergedError("every image holds NaN or Inf: the model has diverged, or the settings do not suit it.")
    written = [str(out)]
    if out.suffix == ".npz":
        save_npz(out, lambda: folder.read_all(count))
    if out.suffix == ".png" and sheet != out:
        rows = first_of_each(folder.read_all(count), labels, columns=len(labels))
        images.save_png(out, _plain_grid(list(rows.values())))
    if sheet is not None:
        rows = first_of_each(folder.read_all(count), labels)
        images.save_png(sheet, images.contact_sheet([(classes.name(label), row) for label, row in rows.items()]))
        written.append(str(sheet))
        shown = sum(map(len, rows.values()))
        if shown < len(labels):
            print(f"{sheet} shows {shown} of {len(labels)} images, of {len(rows)} of {len(np.unique(labels))} classes")
    if paths.gif is not None and paths.strip is not None:
        save_trajectory(drawing, paths.gif, paths.strip)
        written.extend([str(paths.gif), str(paths.strip)])
    folder.remove()
    single = f"; single images in {paths.singles}" if paths.singles is not None else ""
    print(f"{len(labels) - len(missing)} images in {' and '.join(dict.fromkeys(written))}{single}")
    return missing


def _check_rows(out: Path, labels: np.ndarray) -> None:
    classes = len(np.unique(labels))
    if out.suffix == ".png" and classes > ROWS:
        raise InputError(
            f"--out={out}: a picture has a row for each of up to {ROWS} classes, and there are {classes}: give a name "
            "that ends in .npz, with --grid for a sheet of the first, or fewer --labels."
        )


def _plain_grid(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Arrange one row a label; short rows end in white."""
    columns = max(len(row) for row in rows)
    blank = np.full_like(rows[0][0], 255)
    return images.grid(np.array([tile for row in rows for tile in [*row, *[blank] * (columns - len(row))]]), columns)


def run_settings(options: argparse.Namespace, drawing: Drawing) -> dict[str, Any]:
    """Return every setting that decides the pixels."""
    sampler, guide, negatives = drawing.sampler, drawing.call["guide"], drawing.call["negative_labels"]
    return {
        "workdir": str(Path(options.workdir).resolve()),
        "checkpoint": options.step,
        "model": _fingerprint(drawing.model),
        "guide": "" if guide is None else _fingerprint(guide),
        "solver": repr(sampler.settings.solver),
        "steps": sampler.settings.steps,
        "time_grid": repr(sampler.settings.time_grid),
        "guidance_scale": float(sampler.guidance_scale),
        "guidance_interval": list(sampler.settings.guidance_interval),
        "negative_labels": {str(label): negative for label, negative in sorted(negatives.items())},
        "vae": options.vae and f"{options.vae_dtype} {options.vae_tile}",
        "precision": sampler.settings.precision,
        "seed": options.seed,
        "num_samples": len(drawing.labels),
        "labels": hashlib.blake2b(np.asarray(drawing.labels, "<i8").tobytes(), digest_size=8).hexdigest(),
        "batch_size": options.batch_size,
        "png_folder": options.png_folder and str(Path(options.png_folder).resolve()),
    }


def _fingerprint(model: nnx.Module) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(split(model)[1].items()):
        digest.update(name.encode())
        digest.update(np.asarray(value).tobytes())
    return digest.hexdigest()
