"""Labels of the images to draw."""

import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.flow.inputs import check_labels


def balanced_labels(num_classes: int, count: int) -> np.ndarray:
    """Return labels int32 (count,): classes in turn, or spread evenly over the classes if there are fewer labels."""
    if count < num_classes:
        return (np.arange(count) * num_classes // count).astype(np.int32)
    return np.resize(np.arange(num_classes), count).astype(np.int32)


def parse_labels(text: str, count: int | None, num_classes: int, seed: int) -> np.ndarray:
    """Parse "balanced" (see `balanced_labels`), "random", or classes to repeat in turn, to labels int64 (count,).

    A longer run begins with the labels of a shorter one, unless a balanced run has fewer images than classes. Raises
    InputError for other text or fewer than one image.
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
