"""Errors that a user can cause.

Each message is one sentence that names the offending value, says what was expected and how to fix it. Commands print
it and exit with `exit_status`; callers from Python catch `MPDiTError`, or the built-in class beside it.
"""


class MPDiTError(Exception):
    """Base of every error this package raises for bad input."""

    exit_status = 1


class ConfigError(MPDiTError, ValueError):
    """A configuration field, preset or flag has an impossible value."""


class InputError(MPDiTError, ValueError):
    """An argument, flag, array or file is invalid, or a file cannot be read or written."""


class DataError(MPDiTError, ValueError):
    """A data set is missing, damaged or does not fit the config."""


class WeightsError(MPDiTError, ValueError):
    """A weights file or state dict cannot be read into the model it is meant for."""


class CheckpointError(MPDiTError, RuntimeError):
    """A workdir or checkpoint is missing, damaged, or belongs to another configuration."""


class UnavailableError(CheckpointError):
    """A checkpoint cannot be read though it may be undamaged: no permission, or a newer version wrote it."""


class MissingExtraError(MPDiTError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""


class DivergedError(MPDiTError, ArithmeticError):
    """Training produced numbers that are not finite; the commands' status is 3."""

    exit_status = 3


class ProcessError(MPDiTError, RuntimeError):
    """The processes of one command did not find each other, or do not agree."""


class DamageWarning(UserWarning):
    """A damaged checkpoint was ignored, and an older one is used."""


class DataWarning(UserWarning):
    """Files of a data set or lines of a log are left out, or classes have no examples; the message says which."""


class DeviceWarning(UserWarning):
    """A setting for another kind of device is replaced here; the message names both."""


class WeightsWarning(UserWarning):
    """Part of a weights file was taken, and the rest left out."""


def install_extra(extra: str) -> str:
    """Say how to install an extra of setup.py, in words: no package index has mpdit_jax, so no one command fits all."""
    return f"install mpdit_jax with its extra [{extra}] (in a clone: pip install -e '.[{extra}]')"


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, for use in a message; the class name if the error has no text."""
    text = str(error.args[0] if len(error.args) == 1 else error)  # str() of a KeyError adds quotes
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
