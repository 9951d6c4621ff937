"""Location of a VAE's files: a local folder, or a download from the Hugging Face hub."""

import re
from pathlib import Path, PurePosixPath

from mpdit_jax.errors import MissingExtraError, WeightsError, install_extra
from mpdit_jax.io.paths import expand
from mpdit_jax.vae.weights import CONFIG_FILE, WEIGHTS_FILES, shard_names

# owner/name, optionally followed by folders inside the repository.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w-][\w.-]*)*")


def locate(source: str | Path) -> Path:
    """Return the folder with the files of a VAE, given a folder or a hub name; see `load_vae`.

    An existing folder takes precedence over a hub name. Files in the hub's cache need no network.

    Raises:
        WeightsError: no such folder, or the hub cannot be reached or does not have it.
        MissingExtraError: `source` is a hub name and huggingface_hub is not installed.
    """
    folder = expand(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise WeightsError(f"{source} is a file; pass the folder that holds {CONFIG_FILE} and {WEIGHTS_FILES[0]}.")
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(source):
        raise WeightsError(
            f"{source}: no such folder; pass one that holds {CONFIG_FILE} and {WEIGHTS_FILES[0]}, "
            "or a hub name such as stabilityai/sd-vae-ft-ema."
        )
    return _download(source)


def _download(name: str) -> Path:
    owner, repository, *inside = name.split("/")
    page = PurePosixPath("huggingface.co", owner, repository, "tree", "main", *inside)
    by_hand = f"put {CONFIG_FILE} and {WEIGHTS_FILES[0]} from https://{page} into a folder and pass its path"
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError(
            f"{name}: no such folder; to fetch it from the hub, {install_extra('hub')}; or {by_hand}."
        ) from error
    repo_id, subfolder = f"{owner}/{repository}", "/".join(inside) or None
    try:
        config = hf_hub_download(repo_id, CONFIG_FILE, subfolder=subfolder)
        *files, last = WEIGHTS_FILES
        for file in files:
            try:
                weights = hf_hub_download(repo_id, file, subfolder=subfolder)
                break
            except LocalEntryNotFoundError:  # no network, and the file is not in the cache
                raise
            except EntryNotFoundError:
                continue
        else:
            weights = hf_hub_download(repo_id, last, subfolder=subfolder)
        if weights.endswith(".json"):
            for shard in shard_names(Path(weights)):
                hf_hub_download(repo_id, shard, subfolder=subfolder)
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise WeightsError(
            f"{name}: no such folder, and it could not be fetched from the hub ({reason.rstrip('.')}); {by_hand}."
        ) from error
    return Path(config).parent
