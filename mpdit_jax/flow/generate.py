"""Many images, a batch at a time, with progress."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mpdit_jax.flow.inputs import check_labels
from mpdit_jax.flow.randomness import draw_noise
from mpdit_jax.flow.sampler import Sampler
from mpdit_jax.model.mpdit import MPDiT


def generate_latents(sampler: Sampler, model: MPDiT, labels: np.ndarray, key: jax.Array, batch_size: int) -> np.ndarray:
    """One latent for each label, float32 (N, H, W, C); image i depends on (key, i, labels[i]) and the settings alone.

    The last batch is filled up, so that there is one compilation.

    Raises:
        InputError: a label the model does not have.
    """
    check_labels(labels, model.num_classes)
    count, size = len(labels), min(batch_size, len(labels))
    drawn = []
    columns = (TextColumn("sampling"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("images"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stdout)) as progress:
        for start in progress.track(range(0, count, size), total=-(-count // size)):
            indices = np.minimum(np.arange(start, start + size), count - 1)
            noise = draw_noise(key, jnp.asarray(indices), model.input_shape)
            drawn.append(np.asarray(sampler(model, labels[indices], key, noise)))
    return np.concatenate(drawn)[:count]
