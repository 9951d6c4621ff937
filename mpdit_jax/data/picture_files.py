"""Which files below a folder are pictures of a data set."""

import os
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from mpdit_jax.errors import DataError, DataWarning
from mpdit_jax.io.pictures import SUFFIXES

# Of unpackers, file servers and desktops, in lower case.
_LEFTOVERS = ("__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin")


def find_pictures(root: Path, also: Collection[str] = ()) -> list[str]:
    """Find every picture below a folder, by its ending; the sorted paths are relative to it, with `/` between names.

    Hidden files and folders and known leftovers of other programs are left out at every depth. A DataWarning counts
    them, and the files with other endings. The paths `also` are listed whether or not they are there.

    Raises:
        DataError: no such folder.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected one of images.")
    found, left_out, unread = list[str](), list[str](), Counter[str]()
    for folder, folders, files in os.walk(root, followlinks=True):
        left_out += [name for name in (*folders, *files) if is_left_out(name)]
        folders[:] = [name for name in folders if not is_left_out(name)]
        place = Path(folder).relative_to(root)
        for name in files:
            if is_left_out(name):
                continue
            if name.lower().endswith(SUFFIXES):
                found.append((place / name).as_posix())
            else:
                unread[Path(name).suffix.lower() or "without an ending"] += 1
    notes = []
    if left_out:
        shown = ", ".join(sorted(set(left_out))[:3])
        notes.append(f"{len(left_out)} hidden files, folders or leftovers are left out ({shown})")
    if unread:
        often = sorted(unread.items(), key=lambda item: (-item[1], item[0]))[:5]
        kinds = ", ".join(f"{count} {kind}" for kind, count in often)
        notes.append(f"{unread.total()} files are of kinds that are not read ({kinds})")
    if notes:
        warnings.warn(f"{root}: {' and '.join(notes)}.", DataWarning, stacklevel=2)
    return sorted({*found, *also})


def find_labelled_pictures(root: Path, also: Collection[str] = ()) -> tuple[list[str], list[int], list[str]]:
    """Find the pictures of a folder with one subfolder a class, as torchvision's ImageFolder does; see `find_pictures`.

    Returns:
        Paths as of `find_pictures`, class by class; the label of each; the classes' names, sorted.

    Raises:
        DataError: no such folder, or no pictures in subfolders.
    """
    found = [path.partition("/") for path in find_pictures(root, also)]
    labelled = sorted((name, rest) for name, slash, rest in found if slash)
    if not labelled:
        problem = f"{len(found)} images, and no images in subfolders" if found else "no images in subfolders"
        raise DataError(
            f"{root}: {problem}; expected {root}/CLASS/IMAGE, where one subfolder makes one class, with names that end "
            f"in {', '.join(SUFFIXES)}."
        )
    if beside := len(found) - len(labelled):
        warnings.warn(f"{root}: {beside} images lie in no subfolder and are left out.", DataWarning, stacklevel=2)
    folders = {path.name for path in root.iterdir() if path.is_dir() and not is_left_out(path.name)}
    names = sorted(folders.union(name for name, _ in labelled))
    label = {name: index for index, name in enumerate(names)}
    return [f"{name}/{rest}" for name, rest in labelled], [label[name] for name, _ in labelled], names


def is_left_out(name: str) -> bool:
    """Return whether a file or folder is hidden, or a known leftover of another program."""
    return name.startswith(".") or name.lower() in _LEFTOVERS
