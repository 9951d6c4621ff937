"""Checks of the arguments of a sampler. Shapes are always checked, values unless they are traced."""

from collections.abc import Mapping, Set
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpdit_jax.errors import InputError
from mpdit_jax.flow.protocols import ClassConditional, DeclaresConvention, DeclaresNullClass
from mpdit_jax.flow.randomness import NO_IMAGE

Negatives: TypeAlias = jax.typing.ArrayLike | Mapping[int, int] | None


def is_traced(value: object) -> bool:
    """Return whether a value is a tracer, known only at run time."""
    return isinstance(value, jax.core.Tracer)


def check_model(model: object, name: str = "model") -> ClassConditional:
    """Return the model. Raise InputError unless it is an NNX module with the call signature and predicts velocities."""
    if not isinstance(model, nnx.Module) or not isinstance(model, ClassConditional):
        raise InputError(
            f"{name}={type(model).__name__}: expected an MPDiT, or an NNX module called as model(x, t, y) that has "
            "input_shape (H, W, C) and num_classes."
        )
    check_convention(model, name)
    return cast(ClassConditional, model)


def check_convention(model: object, name: str = "model") -> None:
    """Raise InputError if the model declares a convention other than "velocity"."""
    if isinstance(model, DeclaresConvention) and model.convention != "velocity":
        raise InputError(
            f"{name}'s convention is {model.convention!r}: expected 'velocity' (noise minus data, with t=0 at the data "
            "and t=1 at the noise); mpdit_jax.as_velocity(model) converts a DiT or SiT."
        )


def check_guide(guide: object, model: ClassConditional) -> None:
    """Raise InputError unless `guide` is a model with the same latent shape and number of classes."""
    worse = check_model(guide, "guide")
    if worse.input_shape != model.input_shape:
        raise InputError(f"guide draws {worse.input_shape} and model {model.input_shape}: expected the same shape.")
    if worse.num_classes != model.num_classes:
        raise InputError(
            f"guide has {worse.num_classes} classes and model {model.num_classes}: expected the same number, because "
            "both get the same labels."
        )


def check_key(key: object) -> None:
    """Raise InputError unless `key` is a JAX random key, typed or raw (uint32)."""
    is_key = isinstance(key, jax.Array) and (
        (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0)
        or (key.dtype == jnp.uint32 and key.ndim == 1)
    )
    if not is_key:
        raise InputError(f"key={key!r}: expected a random key, such as jax.random.key(0), even if noise is given.")


def check_labels(labels: jax.typing.ArrayLike, num_classes: int, name: str = "label") -> jax.Array:
    """Return the labels as int32 (B,). Raise InputError unless they are a vector of integers in [0, num_classes]."""
    values: Any = labels if is_traced(labels) else np.asarray(labels)
    if values.ndim != 1 or 0 in values.shape or not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"{name}s of shape {values.shape}, dtype {values.dtype}: expected whole numbers (B,).")
    if not is_traced(labels):
        bad = values[(values < 0) | (values > num_classes)]
        if bad.size:
            raise InputError(
                f"{name} {bad[0]} is out of range: this model has classes 0 to {num_classes - 1} "
                f"(and {num_classes}, the null class)."
            )
    return jnp.asarray(labels, jnp.int32)


def check_null_class(model: ClassConditional, labels: jax.Array, negatives: jax.Array | None, by_default: bool) -> None:
    """Raise InputError if labels (B,) need the null class of a model that declares it untrained.

    `negatives` are None if nothing is guided. `by_default` says that they are the null class because none were given,
    which cannot be seen in traced values.
    """
    if not isinstance(model, DeclaresNullClass) or model.null_class:
        return
    values = [value for value in (labels, negatives) if value is not None and not is_traced(value)]
    if by_default or any((np.asarray(value) == model.num_classes).any() for value in values):
        raise InputError(
            f"this model's null class, label {model.num_classes}, was not trained (there was no label dropout), and "
            "guidance needs it: use guidance_scale=1, or guide by negative labels or by a weaker model."
        )


def check_indices(indices: jax.typing.ArrayLike | None, count: int) -> jax.Array:
    """Return the image indices as integers (count,), by default 0, 1, … Raise InputError for a wrong shape or index."""
    if indices is None:
        return jnp.arange(count, dtype=jnp.uint32)
    values: Any = indices if is_traced(indices) else np.asarray(indices)
    if values.shape != (count,) or not np.issubdtype(values.dtype, np.integer):
        raise InputError(
            f"indices {values.shape}, dtype {values.dtype}: expected a whole number for each of {count} labels."
        )
    if not is_traced(indices):
        bad = values[(values < 0) | (values >= NO_IMAGE)]
        if bad.size:
            raise InputError(f"index {bad[0]}: expected the index of an image, from 0 to {NO_IMAGE - 1}.")
    return indices if isinstance(indices, jax.Array) else jnp.asarray(values.astype(np.uint32))


def check_scale(scale: jax.typing.ArrayLike, batch: int | None = None) -> jax.Array | np.ndarray:
    """Return the guidance scale as float32, () or (batch,). Raise InputError for a negative or non-finite scale."""
    if not is_traced(scale):
        try:
            scale = np.asarray(scale, np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"guidance_scale={scale!r}: expected a number, or one for each label.") from error
        bad = scale[~((scale >= 0) & np.isfinite(scale))]
        if bad.size:
            raise InputError(f"guidance_scale={bad.ravel()[0]}: expected 0 or more (1.0 is no guidance).")
    shape = np.shape(scale)
    if len(shape) > 1 or (shape and batch is not None and shape != (batch,)):
        each = "" if batch is None else f" ({batch},)"
        raise InputError(f"guidance_scale of shape {shape}: expected one number, or one for each label{each}.")
    return scale if isinstance(scale, np.ndarray) else jnp.asarray(scale, jnp.float32)


def check_negatives(negatives: Negatives, labels: jax.Array, num_classes: int, default: jax.Array) -> jax.Array:
    """Return the labels of the worse velocity, int32 (B,), from one per image, one for all, or {class: negative}."""
    if negatives is None:
        return default
    if isinstance(negatives, Mapping):
        if not negatives:
            return default
        check_labels(np.array([*negatives]), num_classes)
        values = check_labels(np.array([*negatives.values()]), num_classes, "negative label")
        # Classes without an entry keep the default.
        table = jnp.full(num_classes + 1, -1, jnp.int32).at[np.array([*negatives])].set(values)
        return jnp.where(table[labels] < 0, default, table[labels])
    if isinstance(negatives, Set):
        raise InputError(f"negative_labels={negatives!r}: expected one for each label, or {{class: negative}}.")
    if np.ndim(negatives) == 0:
        negatives = jnp.broadcast_to(jnp.asarray(negatives), labels.shape)
    checked = check_labels(negatives, num_classes, "negative label")
    if checked.shape != labels.shape:
        raise InputError(
            f"{checked.shape[0]} negative labels for {labels.shape[0]} labels: expected one for each, or "
            "{class: negative}."
        )
    return checked


def check_shape(value: jax.typing.ArrayLike, shape: tuple[int, ...], name: str, meaning: str) -> jax.Array:
    """Return the array as float32. Raise InputError unless it has the shape, which `meaning` describes."""
    if np.shape(value) != shape:
        raise InputError(f"{name} {np.shape(value)}: expected {shape}, {meaning}.")
    return jnp.asarray(value, jnp.float32)
