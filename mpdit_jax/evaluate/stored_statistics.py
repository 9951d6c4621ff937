"""Files of statistics: ours, pytorch-fid's, and ADM's reference batches.

They are `.npz` with mu (d,) and sigma (d, d) of the pool features. ADM's add mu_s and sigma_s of the spatial features
and images as arr_0; ours add features (n, d) on request and a JSON text, `mpdit_jax`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from mpdit_jax.data.image_sets import open_npz
from mpdit_jax.errors import InputError
from mpdit_jax.evaluate.extractors import Extractor
from mpdit_jax.evaluate.statistics import Gaussian, Statistics
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json
from mpdit_jax.io.npz import npz_names, read_npz
from mpdit_jax.version import __version__

_ABOUT = "mpdit_jax"
_GAUSSIANS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def save_statistics(path: str | Path, statistics: Statistics, *, features: bool = False) -> None:
    """Write a file that `load_statistics` and pytorch-fid read; raises InputError if it cannot be written.

    `features` adds the features of each image, which precision, recall and KID need.
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


def holds_statistics(path: Path, extractor: str) -> bool:
    """Return whether a file is an `.npz` with statistics for an extractor of that name, or with no images.

    For networks other than Inception, an ADM reference batch counts as images.
    """
    found = extractor_of(path)
    return found is not None and (found == extractor or "arr_0" not in npz_names(path))


def extractor_of(path: Path) -> str | None:
    """Return the extractor of the statistics in an `.npz`, by default Inception; None without statistics."""
    try:
        names = npz_names(path)
        if not {"mu", "sigma"} <= names:
            return None
        about = parse_json(str(read_npz(path, [_ABOUT])[0])) if _ABOUT in names else {}
    except ValueError:
        return None
    return str(about.get("extractor", "inception")) if isinstance(about, dict) else "inception"


def load_statistics(path: str | Path, extractor: Extractor, *, prefix: str = "--") -> Statistics:
    """Read statistics of the extractor; a file that names no extractor counts as Inception's.

    `prefix` begins flags or fields in messages, "--" or "config.eval.". If the file has images
    (`arr_0`), only their size is recorded.

    Raises:
        InputError: a missing or damaged file, or statistics of another extractor.
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
            f"({extractor.fingerprint[:12]}): numbers of two extractors do not compare; use {prefix}features and the "
            "weights and settings of the file, or give the images."
        )
    _check_arrays(path, {name: array for name, array in arrays.items() if name != _ABOUT}, extractor)
    if "arr_0" in names:
        of_what |= {"shape": list(open_npz(path).shape)}
    known = fingerprint or "unknown: the file does not say, and this extractor is assumed"
    file = {"path": str(path), "sha256": digest.hexdigest(), "extractor_fingerprint": known}
    if not fingerprint and (doubt := _doubt_preprocessing(path, "mu_s" in names, extractor, f"{prefix}preprocessing")):
        file["warning"] = doubt
        if jax.process_index() == 0:
            print(f"warning: {doubt}")
    return Statistics(name, fingerprint, count, gaussians, features, None, of_what, file)


def _check_arrays(path: Path, arrays: Mapping[str, np.ndarray], extractor: Extractor) -> None:
    """Raise InputError unless every array has the extractor's dimensions and is finite."""
    shapes: dict[str, tuple[int | None, ...]] = {}
    for output, (mean, covariance) in _GAUSSIANS.items():
        dimension = extractor.outputs.get(output)
        shapes |= {mean: (dimension,), covariance: (dimension, dimension)}
    for name, array in arrays.items():
        expected = shapes.get(name, (*array.shape[:1], extractor.outputs["pool"]))  # features (n, d)
        if array.shape != expected or array.dtype.kind != "f":
            raise InputError(
                f"{path}: {name} is {array.dtype} {array.shape}; expected floats {expected} of {extractor.name}: the "
                "file is of another extractor or damaged; save statistics again by --save_stats."
            )
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} holds NaN or Inf; make or download the file again.")


def _doubt_preprocessing(path: Path, from_adm: bool, extractor: Extractor, setting: str) -> str:
    """Return a warning if a file may have resized its images unlike the extractor, or "".

    Raises InputError for ADM's files, the only ones with spatial moments, unless the extractor resizes as TensorFlow.
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
