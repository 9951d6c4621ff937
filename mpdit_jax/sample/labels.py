"""Labels of the images to draw."""

import jax
import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.sample.classes import Classes

_DRAWN = ("balanced", "random")


def balanced_labels(classes: np.ndarray, count: int) -> np.ndarray:
    """Return labels int32 (count,): classes in turn, or spread evenly over the classes if there are fewer labels."""
    if count < len(classes):
        return classes[np.arange(count) * len(classes) // count].astype(np.int32)
    return np.resize(classes, count).astype(np.int32)


def parse_labels(text: str, count: int | None, classes: Classes, seed: int) -> np.ndarray:
    """Parse "balanced" (see `balanced_labels`), "random", or labels to repeat in turn, to labels int64 (count,).

    Balanced and random labels leave out classes without training examples, with a note. A longer run begins with the
    labels of a shorter one, unless a balanced run has fewer images than classes. Raises InputError for other text or
    fewer than one image.
    """
    drawn = text in _DRAWN
    chosen = classes.seen() if drawn else classes.find(text, "--labels", _DRAWN)
    if drawn and len(chosen) < len(classes.names) and jax.process_index() == 0:
        print(f"--labels={text} leaves out classes without training examples: {classes.describe(classes.unseen)}")
    count = 8 * len(chosen) if count is None else count
    if count < 1:
        raise InputError(f"--num_samples={count}: expected 1 or more.")
    if text == "random":
        return chosen[np.random.default_rng(seed).integers(len(chosen), size=count)]
    return balanced_labels(chosen, count).astype(np.int64) if drawn else np.resize(chosen, count)
