"""Which classes are drawn."""

import numpy as np

from mpdit_jax.errors import InputError
from mpdit_jax.flow.inputs import check_labels


def balanced_labels(num_classes: int, count: int) -> np.ndarray:
    """Labels int32 (count,): every class equally often, in turn; fewer than classes are spread evenly over them."""
    if count < num_classes:
        return (np.arange(count) * num_classes // count).astype(np.int32)
    return np.resize(np.arange(num_classes), count).astype(np.int32)


def parse_labels(text: str, count: int | None, num_classes: int, seed: int) -> np.ndarray:
    """Labels int64 (count,) of "balanced" (see `balanced_labels`), "random", or a list of classes, repeated in turn.

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
