"""Phases of `python -m mpdit_jax.evaluate`, after its arguments are parsed."""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from mpdit_jax.checkpoint.load import load_config
from mpdit_jax.config.evaluation import ALIASES, metric_names
from mpdit_jax.data.image_sets import ImageSet, open_set
from mpdit_jax.data.sources import load_source
from mpdit_jax.distributed.collectives import assert_equal_across_processes
from mpdit_jax.errors import InputError, MissingExtraError, WeightsError
from mpdit_jax.evaluate.compute import compute_statistics, kept, needed
from mpdit_jax.evaluate.decoding import find_decode
from mpdit_jax.evaluate.extractors import Extractor, make_extractor
from mpdit_jax.evaluate.inception_weights import VARIABLE, locate_inception
from mpdit_jax.evaluate.reference import Reference, own_images
from mpdit_jax.evaluate.report import Result, make_result
from mpdit_jax.evaluate.statistics import Statistics, check_count
from mpdit_jax.evaluate.stored_statistics import extractor_of
from mpdit_jax.evaluate.subsets import random_subset
from mpdit_jax.io.paths import expand

_OF_INCEPTION = {*ALIASES, "sfd", "is"}  # metrics that the packaged network does not have


def choose_features(features: str, metrics: str, inception: str, reference: str) -> str:
    """Return the extractor's name: the given one, else Inception if its weights are found, else the packaged network.

    Raises:
        WeightsError: Inception's weights are named and missing, or missing and needed by a metric or the reference.
    """
    if features:
        return features
    try:
        locate_inception(inception)
    except WeightsError:
        named, path = inception or os.environ.get(VARIABLE), expand(reference)
        if named or _OF_INCEPTION & set(metric_names(metrics)):
            raise
        if path.is_file() and extractor_of(path) == "inception":
            raise
        return "efficientnet_lite0"
    return "inception"


def prepare_extractor(options: argparse.Namespace, features: str) -> Extractor:
    """Build the extractor, the same on all processes; print a notice if Inception's weights were not found.

    Raises:
        InputError: settings of Inception for another extractor.
        ProcessError: another process has another extractor or other weights.
        ConfigError, WeightsError, MissingExtraError: see `make_extractor`.
    """
    assert_equal_across_processes({"features": features})  # some machines may lack the weights
    for name in ("preprocessing", "inception"):
        if vars(options)[name] and features != "inception":
            raise InputError(
                f"--{name}={vars(options)[name]} is of the Inception network, and the extractor is {features}: leave "
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
    assert_equal_across_processes({"extractor": extractor.fingerprint})
    if not options.features and features != "inception" and jax.process_index() == 0:
        print(f"no Inception weights found: {features} is used and gives FD({features}), which is not FID")
    return extractor


def make_reference(options: argparse.Namespace, metrics: Sequence[str]) -> Reference:
    """Return the reference of the options: --reference, or the data of --workdir."""
    find = find_decode(options.vae, options.vae_dtype, options.vae_tile)

    def own() -> ImageSet:
        config = load_config(options.workdir)
        return own_images(f"the data of {options.workdir}", load_source(**config.data), config.data, find)

    return Reference(options.reference, metrics, find, own, image_size=options.image_size, k=options.k)


def reference_statistics(
    options: argparse.Namespace,
    extractor: Extractor,
    metrics: Sequence[str],
    scratch: Path,
    shape: tuple[int, int, int],
) -> Statistics:
    """Return the statistics to compare samples of a shape with; `scratch` stores unfinished features."""
    compute = partial(compute_statistics, extractor, batch_size=options.batch_size, scratch=scratch)
    return make_reference(options, metrics).statistics(extractor, shape, compute)


def evaluate_set(
    options: argparse.Namespace, extractor: Extractor, metrics: Sequence[str], scratch: Path
) -> tuple[Statistics, Result | None]:
    """Return the statistics of --samples, and their metrics if any are asked for.

    Raises:
        InputError, DataError: sets that cannot be read, or do not compare.
    """
    # Without metrics the images become a reference and are cropped as one.
    cropped = 0 if metrics else options.image_size
    find = find_decode(options.vae, options.vae_dtype, options.vae_tile)
    opened = open_set(options.samples, image_size=cropped, channels=extractor.channels, find=find)
    _check_size(opened, options, compared=bool(metrics))
    samples = random_subset(opened, options.num_samples)
    check_count(len(samples), metrics, options.k, "samples")
    # Compute the reference first: its errors then come before hours of extracting features.
    reference = reference_statistics(options, extractor, metrics, scratch, samples.shape) if metrics else None
    spatial = {"spatial"} & extractor.outputs.keys() if options.save_stats else set()
    outputs = sorted({*needed(metrics), *spatial})
    keep = sorted({*kept(metrics), *(["pool"] if options.save_features else [])})
    statistics = compute_statistics(
        extractor, samples, outputs, keep, "features of the samples:", batch_size=options.batch_size, scratch=scratch
    )
    if reference is None:
        return statistics, None
    name = Path(options.samples).name
    return statistics, make_result(name, reference, statistics, metrics, options, extractor, {})


def _check_size(samples: ImageSet, options: argparse.Namespace, *, compared: bool) -> None:
    """Raise InputError if samples have another size than --image_size, which crops only folders."""
    height, width = samples.shape[:2]
    if options.image_size in (0, height) and options.image_size in (0, width):
        return
    remedy = ", which cuts the images of a folder alone: leave it out, or give a folder of images."
    if compared:
        remedy = (
            ": samples are compared as they were drawn and never resized; draw them at that size, or give their size "
            "and a reference of that size (photographs are cut with --save_stats alone)."
        )
    raise InputError(
        f"--samples={options.samples} holds images of {height}x{width} pixels and --image_size is {options.image_size}"
        f"{remedy}"
    )
