"""Class names."""

from pathlib import Path

from ml_collections import FrozenConfigDict

from mpdit_jax.data.info import read_dataset_info
from mpdit_jax.data.sources import FASHION_MNIST_CLASSES
from mpdit_jax.errors import InputError

_KNOWN = {"digits": tuple(str(digit) for digit in range(10)), "fashion_mnist": FASHION_MNIST_CLASSES}


def class_names(workdir: str | Path, config: FrozenConfigDict, path: str = "") -> tuple[str, ...]:
    """Return a name for every class of a run: from a file, from its data set, or "class 7".

    `path` is a text file with one name a line, in label order; raises InputError if it is unreadable or too short.
    """
    count = config.model.num_classes
    info = read_dataset_info(workdir)
    stored = info.class_names if info is not None else _KNOWN.get(config.data.name, ())
    names = _read(path) if path else stored
    if path and len(names) < count:
        raise InputError(f"--class_names={path} has {len(names)} names: this model has {count} classes, one line each.")
    return (*(names[label] if label < len(names) else f"class {label}" for label in range(count)), "no class")


def _read(path: str) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in Path(path).read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class_names={path} cannot be read: expected a text file with one name a line.") from error
