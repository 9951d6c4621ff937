"""`workdir/data.json`: what sampling has to know of the data a model was trained on."""

import dataclasses
import json
from pathlib import Path

from mpdit_jax.data.latents import LatentSpace
from mpdit_jax.data.sources import Source
from mpdit_jax.errors import CheckpointError
from mpdit_jax.files import replacing

_FILE = "data.json"


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """Class names in label order, and the VAE's latent space, or None for a model of images."""

    class_names: tuple[str, ...]
    latents: LatentSpace | None


def claim_data(workdir: Path, source: Source, *, trained: bool) -> None:
    """Store a source's facts, or check that they continue those stored.

    Args:
        workdir: of the run.
        source: its data.
        trained: whether the run has steps that other data would contradict.

    Raises:
        CheckpointError: the run was trained on latents of another VAE or normalization.
    """
    facts = DataFacts(tuple(source.class_names), source.latents)
    stored = read_facts(workdir) if trained else None
    if stored is not None and stored.latents != facts.latents:
        raise CheckpointError(
            f"{workdir} was trained on latents of another VAE or normalization ({_say(stored.latents)}) than those of "
            f"config.data.path ({_say(facts.latents)}): give the latents it was trained on, or use another --workdir."
        )
    with replacing(workdir / _FILE) as file:
        file.write((json.dumps(dataclasses.asdict(facts), indent=1) + "\n").encode())


def read_facts(workdir: str | Path) -> DataFacts | None:
    """The facts of a run; None if it has none, as when its folder was put together by hand.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(workdir) / _FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text())
        latents = stored["latents"]
        if latents is not None:
            latents = LatentSpace(
                tuple(map(float, latents["mean"])), tuple(map(float, latents["std"])), str(latents["vae_fingerprint"])
            )
        return DataFacts(tuple(map(str, stored["class_names"])), latents)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); continue the training once to write it anew.") from error


def _say(latents: LatentSpace | None) -> str:
    if latents is None:
        return "images, no latents"
    return f"VAE {latents.vae_fingerprint[:12]}, mean {latents.mean}, std {latents.std}"
