"""`workdir/data.json`: what a run records about its data, for sampling and for continuing it."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from mpdit_jax.data.latents import LatentSpace, check_normalization
from mpdit_jax.data.sources import Source, unseen_classes
from mpdit_jax.errors import CheckpointError
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json

INFO_FILE = "data.json"
INFO_FIELDS = ("class_names", "latents", "labels")  # of every version's file


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """The record of a run's data."""

    class_names: tuple[str, ...]  # in label order
    latents: LatentSpace | None  # None for a model of images
    labels: str | None = None  # number of examples and a digest of their labels in order; None: any labels will do
    unseen: tuple[int, ...] = ()  # classes among `class_names` without examples; runs of 0.1.0 do not record them


def unseen_by(info: DatasetInfo, num_classes: int) -> tuple[int, ...]:
    """Return the classes below `num_classes` that had no examples in a run's data; () where no class has a name."""
    return (*info.unseen, *range(len(info.class_names), num_classes)) if info.class_names else ()


def record_dataset(workdir: Path, source: Source, *, trained: bool) -> None:
    """Record a run's data in its workdir. If it has `trained`, check first that they are the recorded ones.

    Raises:
        CheckpointError: the run was trained on latents of another VAE or normalization, or on other examples.
        DataError: a new run's constants do not normalize its latents, see `check_normalization`.
    """
    unseen = unseen_classes(source.labels, len(source.class_names))
    info = DatasetInfo(tuple(source.class_names), source.latents, _identify(source.labels), unseen)
    stored = read_dataset_info(workdir) if trained else None
    # A run made by `convert` records no VAE, so that its data are checked like those of a new run.
    converted = stored is not None and stored.latents is not None and not stored.latents.vae_fingerprint
    if (converted or not trained) and source.latents is not None and source.measured is not None:
        check_normalization(source.latents, source.measured)
    if stored is not None and not _agree(stored.latents, info.latents):
        raise CheckpointError(
            f"{workdir} was trained on latents of another VAE or normalization ({_say(stored.latents)}) than those of "
            f"config.data.path ({_say(info.latents)}): give the latents and the config.data.normalization it was "
            "trained with, or use another --workdir."
        )
    if stored is not None and stored.labels not in (None, info.labels):
        raise CheckpointError(
            f"{workdir} was trained on other examples (number and digest of the labels: {stored.labels}) than those of "
            f"config.data.path ({info.labels}): give the data it was trained on, or use another --workdir."
        )
    write_dataset_info(workdir, info)


def write_dataset_info(workdir: Path, info: DatasetInfo) -> None:
    """Write the record of a run's data."""
    with atomic_write(workdir / INFO_FILE) as file:
        file.write((to_json(info) + "\n").encode())


def identity(source: Source) -> dict[str, str]:
    """Return the values of a source that must match on every process, in words."""
    return {"data": _identify(source.labels), "latents": _say(source.latents)}


def read_dataset_info(workdir: str | Path) -> DatasetInfo | None:
    """Read the record of a run's data, None if there is none; raises CheckpointError if it is damaged."""
    path = Path(workdir) / INFO_FILE
    if not path.is_file():
        return None
    try:
        return from_json(path.read_text())
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it and repeat the training command, which writes it anew."
        ) from error


def to_json(info: DatasetInfo) -> str:
    """Return the record as JSON."""
    return json.dumps(dataclasses.asdict(info), indent=1)


def from_json(text: str) -> DatasetInfo:
    """Return the record in a JSON text; raises ValueError, KeyError or TypeError if it is none."""
    stored = parse_json(text)
    latents = stored["latents"]
    if latents is not None:
        latents = LatentSpace(
            tuple(map(float, latents["mean"])), tuple(map(float, latents["std"])), str(latents["vae_fingerprint"])
        )
    unseen = tuple(int(one) for one in stored.get("unseen", ()))
    return DatasetInfo(tuple(map(str, stored["class_names"])), latents, stored["labels"], unseen)


def _agree(stored: LatentSpace | None, found: LatentSpace | None) -> bool:
    """Return whether the latent spaces match; a record without a fingerprint, made by convert, matches any VAE."""
    if stored is not None and found is not None and not stored.vae_fingerprint:
        return stored == dataclasses.replace(found, vae_fingerprint="")
    return stored == found


def _identify(labels: np.ndarray) -> str:
    digest = hashlib.blake2b(np.ascontiguousarray(labels, "<i8").tobytes(), digest_size=8).hexdigest()
    return f"{len(labels)} {digest}"


def _say(latents: LatentSpace | None) -> str:
    if latents is None:
        return "images, no latents"
    return f"VAE {latents.vae_fingerprint[:12]}, mean {latents.mean}, std {latents.std}"
