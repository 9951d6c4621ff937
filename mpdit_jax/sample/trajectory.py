"""Film of the denoising of a few images: a GIF and a film strip."""

from pathlib import Path

import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.flow.randomness import seed_key
from mpdit_jax.io import pictures as images
from mpdit_jax.sample.drawing import Drawing, to_block

_LABELS = 8  # rows of the strip
_COLUMNS = 10  # of the strip
_GIF_FRAMES = 60


def save_trajectory(drawing: Drawing, gif: Path, strip: Path) -> None:
    """Draw the first image of up to 8 labels again and save its states; raises InputError if the solver has no path."""
    _, first = np.unique(drawing.labels, return_index=True)
    rows = np.sort(first)[:_LABELS]
    labels, key = drawing.labels[rows], seed_key(drawing.seed)
    solution = drawing.sampler.solve(drawing.model, labels, key, indices=rows, record=True, **drawing.call)
    if solution.path is None or solution.path_times is None:
        raise InputError("this solver records no path: choose another --solver for --trajectory.")
    times, states = np.asarray(solution.path_times), np.asarray(solution.path)  # (n,), (n, B, H, W, C)
    moving = np.linspace(0, len(times) - 1, min(len(times), _GIF_FRAMES)).round().astype(int).tolist()
    # Frames nearest to evenly spaced times.
    still = [int(np.abs(times - t).argmin()) for t in np.linspace(times[0], times[-1], _COLUMNS)]
    frames = {}  # uint8 (B, H, W, C) by number; only frames that are shown are decoded
    for index in {*moving, *still}:
        picture = states[index] if drawing.decode is None else np.asarray(drawing.decode(states[index]))
        frames[index] = to_block(picture, labels, rows).images
    images.save_gif(gif, [images.grid(frames[index], len(rows)) for index in moving])
    captions = [f"{times[index]:.2f}" for index in still]
    images.save_png(strip, images.film_strip(np.stack([frames[index] for index in still]), captions))
