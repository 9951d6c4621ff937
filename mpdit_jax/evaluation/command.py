"""What `python -m mpdit_jax.evaluate` does once its arguments are read."""

import argparse
import dataclasses
import glob
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax

from mpdit_jax.checkpoint import load_config
from mpdit_jax.config import what_is_read
from mpdit_jax.data.npz import npz_names
from mpdit_jax.data.sources import load_source
from mpdit_jax.errors import InputError, MissingExtraError, WeightsError
from mpdit_jax.evaluation.decoding import find_decode
from mpdit_jax.evaluation.extractors import Extractor, make_extractor
from mpdit_jax.evaluation.inception_weights import locate_inception
from mpdit_jax.evaluation.looking import look, needed
from mpdit_jax.evaluation.report import Result, make_result
from mpdit_jax.evaluation.sets import ArrayImages, FindDecode, ImageBlocks, SourceImages, limited, open_npz, open_set
from mpdit_jax.evaluation.settings import ALIASES
from mpdit_jax.evaluation.statistics import Statistics, holds_statistics, load_statistics
from mpdit_jax.files import remove_leftovers

_OF_SINGLE_IMAGES = {"precision", "recall", "kid"}


def choose_features(features: str, metrics: str, inception: str) -> str:
    """The extractor to use where none is named: Inception if its weights are found, else the packaged network.

    Raises:
        WeightsError: Inception's weights are needed, for a metric that only it has, or given and missing.
    """
    if features:
        return features
    try:
        locate_inception(inception)
    except WeightsError:
        if inception or ALIASES.keys() & set(metrics.split(",")):
            raise
        return "efficientnet_lite0"
    return "inception"


def prepare_extractor(options: argparse.Namespace, features: str) -> Extractor:
    """The extractor; says so where it was chosen for want of Inception's weights.

    Raises:
        ConfigError, WeightsError, MissingExtraError: see `make_extractor`.
    """
    try:
        extractor = make_extractor(
            features,
            inception_path=options.inception,
            preprocessing=options.preprocessing,
            image_size=options.feature_size,
            batch_size=options.batch_size,
        )
    except MissingExtraError as error:
        if options.features:
            raise
        raise MissingExtraError(f"{error} Or give Inception's weights by --inception=FILE, for FID.") from error
    if not options.features and features != "inception" and jax.process_index() == 0:
        print(f"no Inception weights found: looking through {features}; this gives FD({features}), which is not FID")
    return extractor


def reference_of(
    options: argparse.Namespace, extractor: Extractor, metrics: Sequence[str], scratch: Path
) -> Statistics:
    """The statistics that samples are compared with: saved ones, or of images; of a run by default its own data.

    Raises:
        InputError, DataError: see `open_set` and `load_statistics`.
    """
    outputs = needed([name for name in metrics if name != "is"])
    if options.reference and _is_statistics(options.reference):
        path = Path(options.reference).expanduser()
        stored = load_statistics(path, extractor)
        images = _pictures_beside(path) if stored.features is None and _OF_SINGLE_IMAGES & set(metrics) else None
        if images is None:
            return stored
        seen = look(extractor, images, ["pool"], scratch, "looking at the reference:")
        return dataclasses.replace(stored, features=seen.features)
    return look(extractor, reference_images(options), outputs, scratch, "looking at the reference:")


def reference_images(options: argparse.Namespace) -> ImageBlocks:
    """The images that --reference names, or those that a run was trained on."""
    if options.reference:
        return open_set(options.reference, image_size=options.image_size, find=_find(options))
    config = load_config(options.workdir)
    if config.data.name == "latents":
        return open_set(config.data.path, find=_find(options))
    source = load_source(**config.data)
    about = {"path": f"the data of {options.workdir}", "count": len(source), "data": what_is_read(config.data)}
    return SourceImages(source, about)


def evaluate_set(
    options: argparse.Namespace, extractor: Extractor, metrics: Sequence[str], scratch: Path
) -> tuple[Statistics, Result | None]:
    """The samples' statistics, and their metrics where there is a reference.

    Raises:
        InputError, DataError: sets that cannot be read, or do not compare.
    """
    opened = open_set(options.samples, image_size=options.image_size, find=_find(options))
    samples = limited(opened, options.num_samples)
    if options.reference:
        _check_sizes(options, samples)
    kept = {"spatial"} & extractor.outputs.keys() if options.save_stats else set()
    outputs = sorted({*needed(metrics), *kept})
    if not options.reference:
        return look(extractor, samples, outputs, scratch, "looking at samples:"), None
    # The reference first: what is wrong with it is known before hours of looking at samples.
    reference = reference_of(options, extractor, metrics, scratch)
    statistics = look(extractor, samples, outputs, scratch, "looking at samples:")
    name = Path(options.samples).name
    return statistics, make_result(name, reference, statistics, metrics, options, extractor, {})


def tidy(scratch: Path, written: Sequence[Path]) -> None:
    """Delete what an earlier start left that was killed while it wrote one of these files, or in `clear`."""
    shutil.rmtree(_cleared(scratch), ignore_errors=True)
    for path in written:
        remove_leftovers(path.parent, glob.escape(path.name))


def clear(scratch: Path) -> None:
    """Delete what is no longer needed once everything is written."""
    tidy(scratch, [])
    if scratch.is_dir():
        # Under another name, for a kill may leave some of the samples, and no settings with them.
        shutil.rmtree(scratch.rename(_cleared(scratch)), ignore_errors=True)


def _cleared(scratch: Path) -> Path:
    return scratch.with_name(f"{scratch.name}.old")


def _check_sizes(options: argparse.Namespace, samples: ImageBlocks) -> None:
    if _is_statistics(options.reference):
        reference: ImageBlocks | None = _pictures_beside(Path(options.reference).expanduser())
    else:
        reference = reference_images(options)
    if reference is not None and samples.shape[:2] != reference.shape[:2]:
        raise InputError(
            f"the samples are {samples.shape[0]}x{samples.shape[1]} pixels and the reference is "
            f"{reference.shape[0]}x{reference.shape[1]}: numbers are of one size only; give the reference of that size."
        )


def _is_statistics(place: str) -> bool:
    path = Path(place).expanduser()
    return path.is_file() and holds_statistics(path)


def _pictures_beside(path: Path) -> ArrayImages | None:
    """The images of an ADM reference batch; None where a file has statistics alone."""
    return open_npz(path) if "arr_0" in npz_names(path) else None


def _find(options: argparse.Namespace) -> FindDecode:
    return find_decode(options.vae, options.vae_dtype, options.vae_tile)
