"""Feature extractors by name.

inception               the network of FID; needs a weights file
efficientnet_lite0      an ImageNet classifier that comes as a Python package (extra [proxy])
classifier:FILE         a file of `python -m mpdit_jax.train_classifier`
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mpdit_jax.config.evaluation import PREPROCESSINGS
from mpdit_jax.distributed.mesh import batch_sharding, make_mesh, replicated
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.evaluate import efficientnet, inception
from mpdit_jax.evaluate.classifier import Classifier, load_classifier
from mpdit_jax.evaluate.inception_weights import load_inception, locate_inception
from mpdit_jax.evaluate.resize import resize

Features: TypeAlias = dict[str, np.ndarray]
"""`pool` (n, d), and where the network has them `spatial` (n, s) and `probs` (n, classes), float32."""

NAMES = ("inception", "efficientnet_lite0", "classifier:FILE")
_MOST_ON_CPU = 4  # images of 299 pixels: activations of more exceed the caches


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A network with its preprocessing, on this process's devices.

    Attributes:
        name: the network's name, with "@64" for efficientnet_lite0 at 64 pixels; only "inception" gives FID.
        outputs: dimensions by name, see `Features`.
        settings: every setting that changes the features.
        fingerprint: SHA-256 of name, settings and weights.
        image_shape: (H, W, C) that images must have, or None where they are resized.
    """

    name: str
    outputs: Mapping[str, int]
    settings: Mapping[str, Any]
    fingerprint: str
    image_shape: tuple[int, int, int] | None
    batch_size: int
    _mesh: Mesh
    _structure: Any
    _state: Any
    _apply: Callable[[Any, jax.Array], dict[str, jax.Array]]

    @property
    def channels(self) -> int:
        """Channels of the images: 1 for a classifier of grey images, else 3."""
        return 3 if self.image_shape is None else self.image_shape[2]

    def __call__(self, images: np.ndarray, rows: np.ndarray | None = None) -> Features:
        """Return the features of uint8 images (n, H, W, 1 or 3); grey becomes RGB with equal channels.

        Raises InputError for another shape or dtype, or features that are not finite; the message names the image by
        its number in the set, `rows` (n,).
        """
        check_images(images)
        if self.image_shape is not None and images.shape[1:] != self.image_shape:
            raise InputError(
                f"images are {images.shape[1:]} and this classifier was trained on {self.image_shape} (height, width, "
                "channels): train one on images of that size."
            )
        found: list[dict[str, np.ndarray]] = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            # Full batches only, so that there is one compilation.
            filled = part[np.arange(self.batch_size) % len(part)]
            outputs = self._apply(self._state, jax.device_put(filled, batch_sharding(self._mesh)))
            found.append({name: np.asarray(array)[: len(part)] for name, array in outputs.items()})
        joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        finite = np.all([np.isfinite(array).all(axis=1) for array in joined.values()], axis=0)  # (n,)
        if not finite.all():
            bad = int(np.argmin(finite))
            raise InputError(
                f"{self.name}: the features of image {bad if rows is None else rows[bad]} hold NaN or Inf; the weights "
                "are damaged."
            )
        return joined


def metric_label(metric: str, extractor: str) -> str:
    """Return the printed name of a metric over an extractor's features: "FID", or "FD(efficientnet_lite0)"."""
    names = {"fd": "FID", "sfd": "sFID", "kid": "KID", "is": "IS", "precision": "precision", "recall": "recall"}
    if extractor == "inception":
        return names[metric]
    proxies = {"fd": "FD", "kid": "KD"}
    return f"{proxies.get(metric, names[metric])}({extractor})"


def make_extractor(
    features: str,
    *,
    inception_path: str = "",
    preprocessing: str = "tensorflow",
    image_size: int = 0,
    batch_size: int = 64,
    prefix: str = "--",
) -> Extractor:
    """Build an extractor by name, on all of this process's devices.

    Args:
        features: one of `NAMES`.
        inception_path: Inception's weights; "" for the usual places, see `locate_inception`.
        preprocessing: Inception's input: "tensorflow" as in FID, ADM and torch-fidelity ((x - 128) / 128, bilinear
            from the corner), or "pytorch_fid" (2x / 255 - 1, bilinear from the pixels' centres).
        image_size: input size of efficientnet_lite0; 0 for 224.
        batch_size: images at a time.
        prefix: prefix of flags or fields in messages, "--" or "config.eval.".

    Raises:
        ConfigError: an unknown name or setting.
        WeightsError, MissingExtraError: weights that are missing or damaged.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected 1 or more images.")
    if preprocessing not in PREPROCESSINGS:
        raise ConfigError(f"preprocessing={preprocessing!r}: expected one of {', '.join(PREPROCESSINGS)}.")
    if image_size and (features != "efficientnet_lite0" or not 32 <= image_size <= 1024):
        raise ConfigError(f"feature_size={image_size}: expected 32 to 1024 pixels, with efficientnet_lite0 alone.")
    kind, _, path = features.partition(":")
    model: nnx.Module
    if features == "inception":
        model = load_inception(locate_inception(inception_path, prefix=prefix), prefix=prefix)
        return build_inception(model, preprocessing=preprocessing, batch_size=batch_size)
    if features == "efficientnet_lite0":
        size = image_size or efficientnet.IMAGE_SIZE
        settings = {"input": f"{size}x{size}, bilinear from pixel centres, (x - 127) / 128", "precision": "float32"}
        outputs = {"pool": efficientnet.FEATURES}
        name = features if size == efficientnet.IMAGE_SIZE else f"{features}@{size}"
        return _build(
            name, efficientnet.load_efficientnet(), partial(_apply_efficientnet, size), outputs, settings, batch_size
        )
    if kind == "classifier" and path:
        return build_classifier(load_classifier(path), batch_size=batch_size)
    raise ConfigError(f"features={features!r}: expected one of {', '.join(NAMES)}.")


def build_inception(model: nnx.Module, *, preprocessing: str = "tensorflow", batch_size: int = 64) -> Extractor:
    """Build the extractor of a loaded Inception network; CPUs get at most 4 images at a time."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        batch_size = min(batch_size, _MOST_ON_CPU * len(devices))
    resized = {"tensorflow": "bilinear from corners", "pytorch_fid": "bilinear from pixel centres"}[preprocessing]
    scaled = {"tensorflow": "(x - 128) / 128", "pytorch_fid": "2x / 255 - 1"}[preprocessing]
    settings = {"input": f"299x299, {resized}, {scaled}", "preprocessing": preprocessing, "precision": "float32"}
    outputs = {"pool": inception.POOL, "spatial": inception.SPATIAL, "probs": inception.CLASSES}
    return _build("inception", model, partial(_apply_inception, preprocessing), outputs, settings, batch_size)


def build_classifier(model: Classifier, *, batch_size: int = 64) -> Extractor:
    """Build the extractor of a trained classifier."""
    config = model.config
    outputs = {"pool": config.features, "probs": config.num_classes}
    shape = (config.height, config.width, config.channels)
    settings = {"input": f"{config.height}x{config.width}x{config.channels}, x / 127.5 - 1", "precision": "float32"}
    return _build("classifier", model, _apply_classifier, outputs, settings, batch_size, shape)


def _build(
    name: str,
    model: nnx.Module,
    apply: Callable[[Any, jax.Array], dict[str, jax.Array]],
    outputs: Mapping[str, int],
    settings: Mapping[str, Any],
    batch_size: int,
    image_shape: tuple[int, int, int] | None = None,
) -> Extractor:
    mesh = make_mesh(devices=jax.local_devices())
    structure, state = nnx.split(model)
    digest = hashlib.sha256(repr((name, sorted(settings.items()))).encode())
    for path, leaf in sorted(nnx.to_flat_state(nnx.as_pure(state)), key=lambda item: str(item[0])):
        digest.update(f"{path} {leaf.shape}".encode() + np.asarray(leaf, "<f4").tobytes())
    return Extractor(
        name,
        outputs,
        settings,
        digest.hexdigest(),
        image_shape,
        -(-batch_size // mesh.size) * mesh.size,
        mesh,
        structure,
        jax.device_put(state, replicated(mesh)),
        jax.jit(lambda state, images: apply(nnx.merge(structure, state), images)),
    )


def check_images(images: np.ndarray) -> None:
    """Raise InputError unless images are uint8 (n, H, W, 1 or 3), n ≥ 1."""
    if images.dtype != np.uint8:
        raise InputError(
            f"images of dtype {images.dtype}: expected uint8 from 0 to 255; from [-1, 1] convert by "
            "mpdit_jax.io.pictures.to_uint8(images)."
        )
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise InputError(f"images of shape {images.shape}: expected (images, height, width, 1 or 3), channels last.")


def _apply_inception(preprocessing: str, model: inception.Inception, images: jax.Array) -> dict[str, jax.Array]:
    x = _rgb(images)
    if preprocessing == "tensorflow":
        x = (resize(x, inception.IMAGE_SIZE, half_pixel=False) - 128) / 128
    else:
        x = 2 * (resize(x, inception.IMAGE_SIZE, half_pixel=True) / 255) - 1
    found = model(x)
    return {"pool": found.pool, "spatial": found.spatial, "probs": jax.nn.softmax(found.unbiased_logits)}


def _apply_efficientnet(size: int, model: efficientnet.EfficientNetLite0, images: jax.Array) -> dict[str, jax.Array]:
    return {"pool": model((resize(_rgb(images), size, half_pixel=True) - 127) / 128)}


def _apply_classifier(model: Classifier, images: jax.Array) -> dict[str, jax.Array]:
    features, logits = model(images.astype(jnp.float32) / 127.5 - 1)
    return {"pool": features, "probs": jax.nn.softmax(logits)}


def _rgb(images: jax.Array) -> jax.Array:
    return jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
