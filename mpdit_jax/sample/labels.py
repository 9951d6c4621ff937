"""Which classes are drawn."""

import numpy as np


def balanced_labels(num_classes: int, count: int) -> np.ndarray:
    """`count` labels, int32 (count,): every class as often, in turn; of fewer than classes, evenly spread over them."""
    if count < num_classes:
        return (np.arange(count) * num_classes // count).astype(np.int32)
    return np.resize(np.arange(num_classes), count).astype(np.int32)
