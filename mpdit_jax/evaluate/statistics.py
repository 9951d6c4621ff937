"""What an extractor saw in a set of images: kept in a file, compared with another set's."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpdit_jax.config.evaluation import fewest_images
from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.extractors import Extractor, metric_label
from mpdit_jax.evaluate.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from mpdit_jax.evaluate.sets import open_npz
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.io.npz import npz_names, read_npz
from mpdit_jax.version import __version__

OF_SINGLE_IMAGES = {"precision", "recall", "kid"}
"""Metrics that no moments suffice for."""
MOMENTS = {"fd": "pool", "sfd": "spatial"}
"""The outputs whose Gaussians others compare."""
KID_SUBSETS = 100
_ABOUT = "mpdit_jax"  # the array that says how a file's statistics were made
_GAUSSIANS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # as pytorch-fid and ADM call them
_KID_SUBSET = 1000  # images


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d), float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one set of images under one extractor.

    Attributes:
        extractor: its name.
        fingerprint: of the extractor; "" where a file does not say, as files of other projects.
        count: images seen; 0 where a file does not say.
        gaussians: by output, "pool" and, of Inception, "spatial".
        features: `pool` of each image (n, d), float32; None where a file has moments only.
        probs: softmax outputs (n, classes), or None.
        about: what the set was and how it was looked at, for the report; another set says something else.
        file: of statistics from a file: its path, a digest of what is in it, and the extractor it says it is of.
    """

    extractor: str
    fingerprint: str
    count: int
    gaussians: dict[str, Gaussian]
    features: np.ndarray | None
    probs: np.ndarray | None
    about: dict[str, Any]
    file: dict[str, Any] = dataclasses.field(default_factory=dict)

    def gaussian(self, output: str) -> Gaussian:
        """Of an output; raises InputError where there is none."""
        if output not in self.gaussians:
            raise InputError(f"{self._say()} has no statistics of the {output} features: give the images themselves.")
        return self.gaussians[output]

    def single(self, metric: str) -> np.ndarray:
        """The features (n, d) of every image; raises InputError where they were not kept."""
        if self.features is None:
            raise InputError(
                f"{self._say()} has moments only, and for {metric} single images are compared: give them, or "
                "statistics saved with --save_features."
            )
        return self.features

    def softmax(self) -> np.ndarray:
        """The probabilities (n, classes) of every image; raises InputError where they were not kept."""
        if self.probs is None:
            raise InputError(
                f"{self._say()} has no class probabilities: the Inception Score needs the samples' images."
            )
        return self.probs

    def _say(self) -> str:
        return str(self.file.get("path") or self.about.get("path") or "the set of images")


def from_moments(
    extractor: Extractor,
    moments: dict[str, Moments],
    features: np.ndarray | None,
    probs: np.ndarray | None,
    about: dict[str, Any],
) -> Statistics:
    """The statistics that merged moments amount to."""
    gaussians = {name: Gaussian(seen.mean, seen.covariance) for name, seen in moments.items()}
    return Statistics(extractor.name, extractor.fingerprint, moments["pool"].count, gaussians, features, probs, about)


def save_statistics(path: str | Path, statistics: Statistics, *, features: bool = False) -> None:
    """Write an .npz that `load_statistics` reads, and pytorch-fid as well.

    Args:
        path: the file.
        statistics: what to write.
        features: also those of each image, which precision, recall and KID need.

    Raises:
        InputError: it cannot be written.
    """
    about = {
        "extractor": statistics.extractor,
        "fingerprint": statistics.fingerprint,
        "count": statistics.count,
        "version": __version__,
        "set": statistics.about,
    }
    arrays = {_ABOUT: np.array(json.dumps(about, sort_keys=True))}
    for name, gaussian in statistics.gaussians.items():
        mean, covariance = _GAUSSIANS[name]
        arrays |= {mean: gaussian.mean, covariance: gaussian.covariance}
    if features and statistics.features is not None:
        arrays["features"] = statistics.features
    with atomic_write(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for allow_pickle


def nothing_seen(extractor: Extractor) -> Statistics:
    """What the Inception Score compares with."""
    return Statistics(extractor.name, extractor.fingerprint, 0, {}, None, None, {})


def holds_statistics(path: Path, extractor: str) -> bool:
    """Whether a file is an .npz with a mean and a covariance that an extractor of that name is to use.

    Those of another extractor, which `load_statistics` refuses, count unless there are images beside them: an ADM
    reference batch is a set of images to every network but Inception.
    """
    found = statistics_of(path)
    return found is not None and (found == extractor or "arr_0" not in npz_names(path))


def statistics_of(path: Path) -> str | None:
    """The extractor that the statistics in an .npz are of, Inception where it does not say; None if there are none."""
    try:
        names = npz_names(path)
        if not {"mu", "sigma"} <= names:
            return None
        about = parse_json(str(read_npz(path, [_ABOUT])[0])) if _ABOUT in names else {}
    except ValueError:
        return None
    return str(about.get("extractor", "inception")) if isinstance(about, dict) else "inception"


def load_statistics(path: str | Path, extractor: Extractor, *, setting: str = "--preprocessing") -> Statistics:
    """The statistics in a file: ours, pytorch-fid's, or an ADM reference batch's.

    A file that does not say which extractor it is of is taken for one of FID's Inception, as all published ones are.
    If there are images in it as well (`arr_0`), their size is noted and nothing else.

    Args:
        path: the file.
        extractor: what it is to be of.
        setting: the flag or field that chooses the extractor's preprocessing, for the sentences.

    Raises:
        InputError: no such file, damaged, or of another extractor, which the message names.
    """
    path = Path(path)
    try:
        names = npz_names(path)
        wanted = sorted(names & {_ABOUT, "features", *(name for pair in _GAUSSIANS.values() for name in pair)})
        arrays = dict(zip(wanted, read_npz(path, wanted), strict=True))
        about = dict(parse_json(str(arrays[_ABOUT]))) if _ABOUT in arrays else {}
        gaussians = {
            name: Gaussian(np.asarray(arrays[mean], np.float64), np.asarray(arrays[covariance], np.float64))
            for name, (mean, covariance) in _GAUSSIANS.items()
            if mean in arrays and covariance in arrays
        }
        features = arrays.get("features")
        name, fingerprint = str(about.get("extractor", "inception")), str(about.get("fingerprint", ""))
        count, of_what = int(about.get("count", 0)), dict(about.get("set", {}))
        digest = hashlib.sha256()
        for array_name in wanted:
            digest.update(f"{array_name} {arrays[array_name].shape}".encode() + arrays[array_name].tobytes())
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"{path} cannot be read as statistics ({error}): expected an .npz with mu and sigma."
        ) from error
    if name != extractor.name or (fingerprint and fingerprint != extractor.fingerprint):
        theirs = f"{name} ({fingerprint[:12]})" if fingerprint else name
        raise InputError(
            f"{path} holds statistics of the extractor {theirs} and this is {extractor.name} "
            f"({extractor.fingerprint[:12]}): numbers of two extractors do not compare; use "
            f"{setting.removesuffix('preprocessing')}features and the weights and settings they were made with, or "
            "give the images."
        )
    for output, gaussian in gaussians.items():
        dimension = extractor.outputs.get(output)
        if gaussian.mean.shape != (dimension,) or gaussian.covariance.shape != (dimension, dimension):
            raise InputError(
                f"{path}: mean {gaussian.mean.shape} and covariance {gaussian.covariance.shape} of {output}; "
                f"{extractor.name} has {dimension} such features: these are statistics of another extractor."
            )
        if not (np.isfinite(gaussian.mean).all() and np.isfinite(gaussian.covariance).all()):
            raise InputError(f"{path}: the statistics of {output} hold NaN or Inf; make or download them again.")
    if features is not None:
        _check_features(path, features, extractor)
    if "arr_0" in names:
        of_what |= {"shape": list(open_npz(path).shape)}
    known = fingerprint or "unknown: the file does not say, and is taken for this one's"
    file = {"path": str(path), "sha256": digest.hexdigest(), "extractor_fingerprint": known}
    if not fingerprint and (doubt := _doubt_preprocessing(path, "mu_s" in names, extractor, setting)):
        file["warning"] = doubt
        if jax.process_index() == 0:
            print(f"warning: {doubt}")
    return Statistics(name, fingerprint, count, gaussians, features, None, of_what, file)


def _check_features(path: Path, features: np.ndarray, extractor: Extractor) -> None:
    dimension = extractor.outputs["pool"]
    if features.ndim != 2 or features.shape[1] != dimension or features.dtype.kind != "f":
        raise InputError(
            f"{path}: features are {features.dtype} {features.shape}; expected floats (images, {dimension}) of "
            f"{extractor.name}: save them again by --save_stats with --save_features."
        )
    if not np.isfinite(features).all():
        raise InputError(f"{path}: the features hold NaN or Inf; save them again by --save_stats with --save_features.")


def _doubt_preprocessing(path: Path, from_adm: bool, extractor: Extractor, setting: str) -> str:
    """What to say where a file does not tell how its images were resized and the extractor's way may not be its; or "".

    Raises:
        InputError: it is not: ADM's files, which alone have spatial moments, are made as TensorFlow resizes.
    """
    used = extractor.settings.get("preprocessing")
    if from_adm and used == "pytorch_fid":
        raise InputError(
            f"{path} has spatial moments, as ADM's evaluator alone writes them, and ADM resizes as TensorFlow does: "
            f"expected {setting}=tensorflow, and it is {used}."
        )
    if from_adm or used != "tensorflow":
        return ""
    return (
        f"{path} does not say how its images were resized: if pytorch-fid made it, give {setting}=pytorch_fid; the "
        "original FID code, ADM and EDM resize as here."
    )


def check_metrics(names: Sequence[str], extractor: Extractor) -> None:
    """Raise InputError unless the extractor has what each metric is computed from."""
    for name in names:
        needed = {"sfd": "spatial", "is": "probs"}.get(name, "pool")
        if needed not in extractor.outputs:
            raise InputError(f"metrics={name}: {extractor.name} has no {needed} output; leave that metric out.")


def check_reference(reference: Statistics, metrics: Sequence[str]) -> None:
    """Raise InputError unless these statistics have what metrics need of the real images."""
    for name in metrics:
        if name in MOMENTS:
            reference.gaussian(MOMENTS[name])
        if name in OF_SINGLE_IMAGES:
            reference.single(name)


def check_count(count: int, metrics: Sequence[str], k: int, whose: str) -> None:
    """Raise InputError unless a set of so many images is large enough for metrics."""
    fewest = fewest_images(metrics, k)
    if count < fewest:
        what = (
            f"precision and recall with k={k} need" if {"precision", "recall"} & set(metrics) else "a covariance needs"
        )
        raise InputError(f"{what} {fewest} images or more in each set: there are {count} {whose}.")


def check_same_size(reference: Mapping[str, Any], samples: Mapping[str, Any]) -> None:
    """Raise InputError if two sets are known to be of another height or width, by what `Statistics.about` says."""
    sizes = [tuple(about.get("shape", ()))[:2] for about in (reference, samples)]
    if all(sizes) and sizes[0] != sizes[1]:
        (height, width), (their_height, their_width) = sizes[1], sizes[0]
        raise InputError(
            f"the samples are {height}x{width} pixels and the reference is {their_height}x{their_width}: numbers are "
            "of one size only; give the reference of that size."
        )


def compare(
    real: Statistics, fake: Statistics, metrics: Sequence[str], *, k: int = 3, splits: int = 10, seed: int = 0
) -> dict[str, float]:
    """The metrics by the names they are printed with; those with a spread add one that ends in " std".

    Raises:
        InputError: what a metric needs is not there, such as the images behind saved statistics.
    """
    results: dict[str, float] = {}
    for name, output in MOMENTS.items():
        if name in metrics:
            first, second = real.gaussian(output), fake.gaussian(output)
            value = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
            results[metric_label(name, fake.extractor)] = value
    if "is" in metrics:
        probs, label = fake.softmax(), metric_label("is", fake.extractor)
        results[label], results[f"{label} std"] = inception_score(probs, min(splits, len(probs)))
    if {"precision", "recall"} & set(metrics):
        pair = precision_recall(real.single("precision and recall"), fake.single("precision and recall"), k)
        for name, value in zip(("precision", "recall"), pair, strict=True):
            if name in metrics:
                results[metric_label(name, fake.extractor)] = value
    if "kid" in metrics:
        sets, size = (real.single("KID"), fake.single("KID")), kid_subset_size(real, fake)
        label = metric_label("kid", fake.extractor)
        results[label], results[f"{label} std"] = kernel_distance(
            *sets, subsets=KID_SUBSETS, subset_size=size, seed=seed
        )
    return results


def kid_subset_size(real: Statistics, fake: Statistics) -> int:
    """How many images of each set KID takes at a time: 1,000, or half of what there is of the smaller one."""
    fewest = min(len(real.single("KID")), len(fake.single("KID")))
    return _KID_SUBSET if fewest >= _KID_SUBSET else max(2, fewest // 2)
