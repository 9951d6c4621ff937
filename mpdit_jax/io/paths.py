"""Paths from users, and the words of a file system that refuses them."""

import errno
import os
import re
from pathlib import Path

from mpdit_jax.errors import InputError, MPDiTError

REFUSALS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT,
    errno.ESTALE, errno.ENAMETOOLONG,
)  # fmt: skip
"""Error numbers of a file system that refuses an operation."""
_URL = re.compile(
    r"(^|[=:,])([a-z][a-z0-9+.-]*://|(gs|s3|r2|az|abfss?|wasbs?|hdfs|hf|ftp|file|https?):/)", re.IGNORECASE
)  # pathlib drops a slash


def check_local(text: str, error: type[MPDiTError] = InputError) -> None:
    """Raise an error if a path, `--flag=PATH` or `kind:PATH` is a URL, of which pathlib would make a folder's name."""
    if _URL.search(text):
        raise error(
            f"{text}: expected a folder or file that this machine sees, not a URL: mount the bucket or download the "
            "files; a VAE on the Hugging Face hub is named OWNER/NAME."
        )


def expand(path: str | Path) -> Path:
    """Replace a leading `~` by the home folder.

    Raises:
        InputError: this machine does not know that user, or `path` is a URL.
    """
    check_local(str(path))
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: this machine knows no home folder of that user; give the whole path.") from error


def check_place(path: Path, *, folder: bool) -> None:
    """Raise InputError if `path` exists and is not a folder, or not a file, as `folder` asks."""
    if path.exists() and path.is_dir() != folder:
        wanted, found = ("folder", "file") if folder else ("file", "folder")
        raise InputError(f"cannot write {path}: a {wanted} is to go there and a {found} is in its place; move it away.")


def reason(error: Exception) -> str:
    """Return the system's own words inside a library's error message, or the message's first line if there are none."""
    text = str(error)
    for code in REFUSALS:
        if os.strerror(code) in text:
            return os.strerror(code)
    return text.splitlines()[0][:200] if text else type(error).__name__
