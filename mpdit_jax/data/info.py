"""`workdir/data.json`: what sampling has to know of the data a model was trained on."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from mpdit_jax.data.latents import LatentSpace
from mpdit_jax.data.sources import Source
from mpdit_jax.errors import CheckpointError
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.io.json_files import parse_json

INFO_FILE = "data.json"
INFO_FIELDS = ("class_names", "latents")
"""Fields of every version's file."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What identifies a run's data.

    Attributes:
        class_names: in label order.
        latents: the VAE's latent space, or None for a model of images.
        labels: number of examples and a digest of their labels in order; None in files of versions without it.
    """

    class_names: tuple[str, ...]
    latents: LatentSpace | None
    labels: str | None = None


def record_dataset(workdir: Path, source: Source, *, trained: bool) -> None:
    """Store a source's facts, or check that they continue those stored.

    Args:
        workdir: of the run.
        source: its data.
        trained: whether the run has steps that other data would contradict.

    Raises:
        CheckpointError: the run was trained on latents of another VAE or normalization, or on other examples.
    """
    facts = DatasetInfo(tuple(source.class_names), source.latents, _identify(source.labels))
    stored = read_dataset_info(workdir) if trained else None
    if stored is not None and stored.latents != facts.latents:
        raise CheckpointError(
            f"{workdir} was trained on latents of another VAE or normalization ({_say(stored.latents)}) than those of "
            f"config.data.path ({_say(facts.latents)}): give the latents it was trained on, or use another --workdir."
        )
    if stored is not None and stored.labels not in (None, facts.labels):
        raise CheckpointError(
            f"{workdir} was trained on other examples (number and digest of the labels: {stored.labels}) than those of "
            f"config.data.path ({facts.labels}): give the data it was trained on, or use another --workdir."
        )
    with atomic_write(workdir / INFO_FILE) as file:
        file.write((json.dumps(dataclasses.asdict(facts), indent=1) + "\n").encode())


def identity(source: Source) -> dict[str, str]:
    """What must be the same of a source wherever it is read, in words."""
    return {"data": _identify(source.labels), "latents": _say(source.latents)}


def read_dataset_info(workdir: str | Path) -> DatasetInfo | None:
    """The facts of a run; None if it has none, as when its folder was put together by hand.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(workdir) / INFO_FILE
    if not path.is_file():
        return None
    try:
        stored = parse_json(path.read_text())
        latents = stored["latents"]
        if latents is not None:
            latents = LatentSpace(
                tuple(map(float, latents["mean"])), tuple(map(float, latents["std"])), str(latents["vae_fingerprint"])
            )
        return DatasetInfo(tuple(map(str, stored["class_names"])), latents, stored.get("labels"))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it and repeat the training command, which writes it anew."
        ) from error


def _identify(labels: np.ndarray) -> str:
    digest = hashlib.blake2b(np.ascontiguousarray(labels, "<i8").tobytes(), digest_size=8).hexdigest()
    return f"{len(labels)} {digest}"


def _say(latents: LatentSpace | None) -> str:
    if latents is None:
        return "images, no latents"
    return f"VAE {latents.vae_fingerprint[:12]}, mean {latents.mean}, std {latents.std}"
