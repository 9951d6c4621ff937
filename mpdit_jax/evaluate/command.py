"""What `python -m mpdit_jax.evaluate` does once its arguments are read."""

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mpdit_jax.checkpoint.load import load_config
from mpdit_jax.config.base import data_identity
from mpdit_jax.config.evaluation import ALIASES, MOST_REAL, metric_names
from mpdit_jax.data.image_sets import ImageSet
from mpdit_jax.data.sources import load_source, rows_of
from mpdit_jax.errors import InputError, MissingExtraError, WeightsError
from mpdit_jax.evaluate.agreement import agree
from mpdit_jax.evaluate.compute import compute_statistics, kept, needed
from mpdit_jax.evaluate.decoding import find_decode
from mpdit_jax.evaluate.extractors import Extractor, make_extractor
from mpdit_jax.evaluate.inception_weights import VARIABLE, locate_inception
from mpdit_jax.evaluate.report import Result, make_result
from mpdit_jax.evaluate.sets import FindDecode, SourceImages, about_source, open_npz, open_set
from mpdit_jax.evaluate.statistics import (
    OF_SINGLE_IMAGES,
    Statistics,
    check_count,
    check_reference,
    check_same_size,
    holds_statistics,
    load_statistics,
    nothing_seen,
    statistics_of,
)
from mpdit_jax.evaluate.subsets import SomeImages, limited
from mpdit_jax.io.npz import npz_names
from mpdit_jax.io.paths import expand

_OF_INCEPTION = {*ALIASES, "sfd", "is"}  # metrics that the packaged network does not have


def choose_features(features: str, metrics: str, inception: str, reference: str) -> str:
    """The extractor to use where none is named: Inception if its weights are found, else the packaged network.

    Raises:
        WeightsError: Inception's weights are needed, for a metric that only it has or a reference that is of it, or
            named and missing.
    """
    if features:
        return features
    try:
        locate_inception(inception)
    except WeightsError:
        named = inception or os.environ.get(VARIABLE)
        if named or _OF_INCEPTION & set(metric_names(metrics)) or _statistics_of(reference) == "inception":
            raise
        return "efficientnet_lite0"
    return "inception"


def prepare_extractor(options: argparse.Namespace, features: str) -> Extractor:
    """The extractor, the same on all processes; says so where it was chosen for want of Inception's weights.

    Raises:
        InputError: settings of Inception for another one.
        ProcessError: another process has chosen another one, or has other weights.
        ConfigError, WeightsError, MissingExtraError: see `make_extractor`.
    """
    agree({"features": features})  # not all of them may have found Inception's weights
    for name in ("preprocessing", "inception"):
        if vars(options)[name] and features != "inception":
            raise InputError(
                f"--{name}={vars(options)[name]} is of the Inception network, and this looks through {features}: leave "
                "it out, or give --features=inception."
            )
    try:
        extractor = make_extractor(
            features,
            inception_path=options.inception,
            preprocessing=options.preprocessing or "tensorflow",
            image_size=options.feature_size,
            batch_size=options.batch_size,
        )
    except MissingExtraError as error:
        if options.features:
            raise
        raise MissingExtraError(f"{error} Or give Inception's weights by --inception=FILE, for FID.") from error
    agree({"extractor": extractor.fingerprint})
    if not options.features and features != "inception" and jax.process_index() == 0:
        print(f"no Inception weights found: looking through {features}; this gives FD({features}), which is not FID")
    return extractor


def reference_of(
    options: argparse.Namespace,
    extractor: Extractor,
    metrics: Sequence[str],
    scratch: Path,
    samples: Mapping[str, Any] | None = None,
) -> Statistics:
    """The statistics that samples are compared with: saved ones, or of images; of a run by default its own data.

    The Inception Score alone compares with nothing, and nothing is looked at.

    Args:
        options: of the command.
        extractor: what looks at images.
        metrics: what they are for.
        scratch: where unfinished features go.
        samples: what is known of the samples, as `Statistics.about`: a reference of another size is not looked at.

    Raises:
        InputError, DataError: see `open_set` and `load_statistics`; a reference that these metrics cannot use.
    """
    if set(metrics) == {"is"}:
        return nothing_seen(extractor)
    real, verb = [name for name in metrics if name != "is"], "looking at the reference:"
    single = OF_SINGLE_IMAGES & set(metrics)
    if not _is_statistics(options.reference, extractor.name):
        images = reference_images(options, extractor.channels)
        check_same_size(images.about, samples or {})
        check_count(len(images), real, options.k, "in the reference")
        return compute_statistics(extractor, images, needed(real), kept(real), scratch, verb)
    path = expand(options.reference)
    stored = load_statistics(path, extractor)
    agree({"reference": stored.file["sha256"]})
    check_same_size(stored.about, samples or {})
    if single and stored.features is None and "arr_0" in npz_names(path):  # as in ADM's batches
        images = open_npz(path)
        check_count(len(images), real, options.k, "in the reference")
        seen = compute_statistics(extractor, images, ["pool"], ["pool"], scratch, verb)
        stored = dataclasses.replace(stored, features=seen.features, about={**stored.about, "images": images.about})
    check_reference(stored, real)
    if single:
        check_count(len(stored.single("single images")), real, options.k, "in the reference")
    return stored


def reference_images(options: argparse.Namespace, channels: int) -> ImageSet:
    """The images that --reference names, or 50,000 at most of those that a run was trained on."""
    if options.reference:
        return open_set(options.reference, image_size=options.image_size, channels=channels, find=_find(options))
    config = load_config(options.workdir)
    source = load_source(**config.data)
    if config.data.name == "latents":
        store = open_set(config.data.path, find=_find(options))
        about = {**store.about, "count": len(source), "data": data_identity(config.data)}
        images: ImageSet = SomeImages(store, rows_of(source), about)
    else:
        about = about_source(f"the data of {options.workdir}", source)
        images = SourceImages(source, about | {"data": data_identity(config.data)})
    return limited(images, min(MOST_REAL, len(images)))


def evaluate_set(
    options: argparse.Namespace, extractor: Extractor, metrics: Sequence[str], scratch: Path
) -> tuple[Statistics, Result | None]:
    """The samples' statistics, and their metrics where any are asked for.

    Raises:
        InputError, DataError: sets that cannot be read, or do not compare.
    """
    # With no metrics they are photographs on the way to being a reference, and are cut as those of a reference are.
    cropped = 0 if metrics else options.image_size
    opened = open_set(options.samples, image_size=cropped, channels=extractor.channels, find=_find(options))
    _check_size(opened, options, compared=bool(metrics))
    samples, verb = limited(opened, options.num_samples), "looking at samples:"
    check_count(len(samples), metrics, options.k, "samples")
    spatial = {"spatial"} & extractor.outputs.keys() if options.save_stats else set()
    outputs = sorted({*needed(metrics), *spatial})
    keep = sorted({*kept(metrics), *(["pool"] if options.save_features else [])})
    if not metrics:
        return compute_statistics(extractor, samples, outputs, keep, scratch, verb), None
    # The reference first: what is wrong with it is known before hours of looking at samples.
    reference = reference_of(options, extractor, metrics, scratch, samples.about)
    statistics = compute_statistics(extractor, samples, outputs, keep, scratch, verb)
    name = Path(options.samples).name
    return statistics, make_result(name, reference, statistics, metrics, options, extractor, {})


def _check_size(samples: ImageSet, options: argparse.Namespace, *, compared: bool) -> None:
    """Raise InputError if samples are of another size than --image_size: those of a folder alone are cut, and none
    that are compared.
    """
    height, width = samples.shape[:2]
    if options.image_size in (0, height) and options.image_size in (0, width):
        return
    if not compared:
        raise InputError(
            f"--samples={options.samples} holds images of {height}x{width} pixels and --image_size is "
            f"{options.image_size}, which cuts the images of a folder alone: leave it out, or give their folder."
        )
    raise InputError(
        f"--samples={options.samples} holds images of {height}x{width} pixels and --image_size is "
        f"{options.image_size}: samples are compared as they were drawn and never resized; draw them at that size, "
        "or give the --image_size and the reference of theirs (photographs are cut with --save_stats alone)."
    )


def _is_statistics(place: str, extractor: str) -> bool:
    path = expand(place)
    return path.is_file() and holds_statistics(path, extractor)


def _statistics_of(place: str) -> str | None:
    path = expand(place)
    return statistics_of(path) if path.is_file() else None


def _find(options: argparse.Namespace) -> FindDecode:
    return find_decode(options.vae, options.vae_dtype, options.vae_tile)
