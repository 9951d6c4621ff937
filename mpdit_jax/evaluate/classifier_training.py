"""Train the small classifier on arrays."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mpdit_jax.errors import DivergedError, InputError
from mpdit_jax.evaluate.classifier import Classifier, ClassifierConfig, initialize
from mpdit_jax.runtime.progress import WorkBar

_HELD_OUT = 10  # every tenth image is kept for the accuracy


def train_classifier(
    read: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    num_classes: int,
    *,
    steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[Classifier, float]:
    """Train on nine tenths of a labelled set and return the classifier and its accuracy on the tenth held out.

    Images are shifted by up to a tenth of their size; the result is the same bits each time.

    Args:
        read: returns the images at indices (n,) as float32 (n, H, W, C) in [-1, 1].
        labels: whole numbers (N,).
        num_classes: number of classes.
        steps: Adam steps; the learning rate falls to 0 by a cosine.
        batch_size: images a step.
        learning_rate: the initial one.
        seed: seed of the weights, the batches and the shifts.
        quiet: show no progress bar.

    Raises:
        InputError: fewer than 20 images, or one class only.
        DivergedError: the loss is not finite.
    """
    check_trainable(len(labels), num_classes)
    if steps < 1 or batch_size < 1:
        raise InputError(f"steps={steps}, batch_size={batch_size}: expected 1 or more of each.")
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    held_out, kept = order[::_HELD_OUT], np.delete(order, np.s_[::_HELD_OUT])
    height, width, channels = read(order[:1]).shape[1:]
    model = initialize(ClassifierConfig(height, width, channels, num_classes), seed)
    structure, parameters = nnx.split(model, nnx.Param)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    state = optimizer.init(parameters)

    def loss(parameters: nnx.State, x: jax.Array, y: jax.Array) -> jax.Array:
        _, logits = nnx.merge(structure, parameters)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(
        parameters: nnx.State, state: optax.OptState, x: jax.Array, y: jax.Array
    ) -> tuple[nnx.State, optax.OptState, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(parameters, x, y)
        with jax.numpy_dtype_promotion("standard"):  # Optax takes powers of integers
            updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    value = jnp.zeros(())
    with WorkBar("training the classifier", "steps", steps, quiet=quiet) as bar:
        for _ in range(steps):
            rows = random.choice(kept, min(batch_size, len(kept)), replace=False)
            x = _shifted(read(rows), random)
            parameters, state, value = update(parameters, state, x, labels[rows].astype(np.int32))
            bar.advance(1)
    if not math.isfinite(float(value)):
        raise DivergedError("the classifier's loss is not finite: lower --learning_rate.")
    trained = nnx.merge(structure, parameters)
    classify = nnx.jit(lambda model, x: model(x)[1].argmax(axis=-1))
    parts = [held_out[start : start + 500] for start in range(0, len(held_out), 500)]
    right = sum(int((np.asarray(classify(trained, read(part))) == labels[part]).sum()) for part in parts)
    return trained, right / len(held_out)


def check_trainable(count: int, num_classes: int) -> None:
    """Raise InputError unless there are enough images and classes to train a classifier."""
    if count < 2 * _HELD_OUT or num_classes < 2:
        raise InputError(f"{count} images of {num_classes} class(es): a classifier needs 20 or more, of 2 or more.")


def _shifted(x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return each image shifted by a few pixels; the border is repeated."""
    reach = max(1, min(x.shape[1:3]) // 10)
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    offsets = random.integers(0, 2 * reach + 1, (len(x), 2))
    return np.stack(
        [image[a : a + x.shape[1], b : b + x.shape[2]] for image, (a, b) in zip(padded, offsets, strict=True)]
    )
