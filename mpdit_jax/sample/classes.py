"""The classes of a run, and labels given by index, range or name."""

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from mpdit_jax.data.info import read_dataset_info, unseen_by
from mpdit_jax.data.sources import FASHION_MNIST_CLASSES
from mpdit_jax.errors import DataWarning, InputError
from mpdit_jax.flow.inputs import check_labels
from mpdit_jax.validation import suggest

NULL = "null"
_KNOWN = {"digits": tuple(str(digit) for digit in range(10)), "fashion_mnist": FASHION_MNIST_CLASSES}


@dataclasses.dataclass(frozen=True)
class Classes:
    """Classes that a model draws."""

    names: tuple[str, ...]  # one a class, in label order
    unseen: tuple[int, ...] = ()  # classes without training examples

    def name(self, label: int) -> str:
        """Return a label's name; the null class is called "no class"."""
        return self.names[label] if label < len(self.names) else "no class"

    def describe(self, labels: Sequence[int]) -> str:
        """Return labels with their names, such as "3 (cat), 5 (dog)", ten at most."""
        return ", ".join(f"{label} ({self.name(label)})" for label in labels[:10]) + ", …" * (len(labels) > 10)

    def seen(self) -> np.ndarray:
        """Return the classes with training examples, int64 (n,); all classes if no class is known to have any."""
        labels = np.arange(len(self.names))
        return found if len(found := np.setdiff1d(labels, self.unseen)) else labels

    def find(self, labels: Any, argument: str, others: Sequence[str] = ()) -> np.ndarray:
        """Return labels int64 (n,) from whole numbers, or from text; warn of classes without training examples.

        Text is an index ("3"), a range ("0-3"), a class name, "null" for the null class, or several with commas between
        them. In text, a number is an index before it is a class name. A whole number never means the null class. Raises
        InputError for anything else, in which `argument` names the flag or argument, `others` are more words for it.
        """
        values = np.atleast_1d(np.asarray(labels))
        if values.dtype.kind in "US":
            values = np.concatenate([self._read(str(text), argument, others) for text in values.ravel()])
        else:
            outside = (values < 0) | (values >= len(self.names)) if values.dtype.kind in "iu" else np.array(False)
            if outside.any():
                raise self._out_of_range(values[outside][0], argument)
            check_labels(values, len(self.names))
        if jax.process_index() == 0 and (unseen := np.intersect1d(values, self.unseen).tolist()):
            warnings.warn(
                f"{self.describe(unseen)}: no training examples, so that the pictures do not show it.",
                DataWarning,
                stacklevel=2,
            )
        return values.astype(np.int64)

    def find_pairs(self, pairs: Mapping[Any, Any], argument: str) -> dict[int, int]:
        """Return {label: other label} of pairs written as in `find`, with one label at the right."""
        found = dict[int, int]()
        for first, second in pairs.items():
            others = self.find(second, argument)
            if len(others) > 1:
                raise InputError(f"{argument}: {second} is more than one class; expected one for each class.")
            found |= dict.fromkeys(self.find(first, argument).tolist(), int(others[0]))
        return found

    def _read(self, text: str, argument: str, others: Sequence[str]) -> list[int]:
        by_name = {name.casefold(): label for label, name in reversed([*enumerate(self.names)])}
        words, found = [text] if text.casefold() in by_name else text.split(","), list[int]()
        for word in map(str.strip, words):
            bounds = re.fullmatch(r"(-?\d+)(?:-(\d+))?", word)
            first, last = (int(bounds[1]), int(bounds[2] or bounds[1])) if bounds else (1, 0)
            if 0 <= first <= last < len(self.names):
                found += range(first, last + 1)
            elif word.casefold() in by_name:
                found.append(by_name[word.casefold()])
            elif word == NULL:
                found.append(len(self.names))
            elif first <= last:
                raise self._out_of_range(first if first < 0 else last, argument)
            else:
                raise InputError(
                    f"{argument}={text}: no class is called {word!r}{suggest(word, [*self.names, NULL, *others])}; "
                    f"expected {', '.join([*others, NULL])}, or indices, ranges such as 0-3 and names such as "
                    f"{self.names[0]} with commas between them."
                )
        return found

    def _out_of_range(self, label: int, argument: str) -> InputError:
        return InputError(
            f"{argument}: label {label} is out of range: this model has classes 0 to {len(self.names) - 1}, and the "
            "null class is written null."
        )


def read_classes(workdir: str | Path, config: FrozenConfigDict, path: str = "") -> Classes:
    """Return the classes of a run, named by a file, by its data set, or as "class 7".

    `path` is a text file with one name a line, in label order; raises InputError if it is unreadable or too short.
    """
    count = config.model.num_classes
    info = read_dataset_info(workdir)
    stored = info.class_names if info is not None else _KNOWN.get(config.data.name, ())
    names = _read_names(path) if path else stored
    if path and len(names) < count:
        raise InputError(f"--class_names={path} has {len(names)} names: this model has {count} classes, one line each.")
    unseen = unseen_by(info, count) if info is not None else ()
    return Classes(tuple(names[label] if label < len(names) else f"class {label}" for label in range(count)), unseen)


def _read_names(path: str) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in Path(path).read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class_names={path} cannot be read: expected a text file with one name a line.") from error
