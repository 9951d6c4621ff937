"""Parts that all commands share: the parser, and an end by one sentence and an exit status."""

import argparse
import io
import os
import shlex
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

import jax

from mpdit_jax.distributed.collectives import barrier
from mpdit_jax.distributed.startup import end_failed, may_be_lost
from mpdit_jax.errors import (
    DamageWarning,
    DataWarning,
    DeviceWarning,
    MPDiTError,
    WeightsWarning,
    first_line,
    install_extra,
)
from mpdit_jax.io.paths import REFUSALS, check_local, expand
from mpdit_jax.runtime.signals import KILLED_BY, LOST, Terminated, ending_by_exception, stopped_status, this_command

_RENAMED = {"--join_timeout": "--initialization_timeout"}  # flags of 0.1.0 by their names of today


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one sentence."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; `parse_args` calls this. What `--config` says is checked with the config.

        A flag that has another name since 0.1.0 ends the command with status 2.

        Raises:
            InputError: an argument is a URL.
        """
        for word in sys.argv[1:] if args is None else args:
            flag = word.partition("=")[0]
            if new := _RENAMED.get(flag):
                self.error(f"{flag} is {new} now")
            if not flag.startswith("--config"):
                check_local(word)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one sentence and where to look, and exit with status 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def make_parser(command: str, description: str, examples: str, *, package: str = "mpdit_jax") -> Parser:
    """Return a parser for `python -m PACKAGE.COMMAND` whose help ends with examples.

    Args:
        command: the module's name inside the package.
        description: what the command does, one paragraph.
        examples: command lines, one a line.
        package: which package the command is of.
    """
    return Parser(
        prog=f"python -m {package}.{command}",
        description=textwrap.fill(description, 100),
        epilog=f"\nexamples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_tile_option(parser: argparse.ArgumentParser) -> None:
    """`--vae_tile`."""
    parser.add_argument(
        "--vae_tile",
        type=int,
        default=0,
        metavar="PIXELS",
        help="larger images pass the VAE in overlapping tiles of this size, in the memory of one (default: never)",
    )


def stopped_line(command: str, arguments: Sequence[str], step: int, steps: int) -> str:
    """Return the last lines of a stopped training: how far it has come, and the command that continues it."""
    again = shlex.join([sys.executable, "-m", f"mpdit_jax.{command}", *arguments])
    saved = "saved" if step else "with nothing trained yet"
    return f"stopped at step {step} of {steps}, {saved}; continue with:\n  {again}"


def run(main: Callable[[Sequence[str]], int], *, resumable: bool = False) -> NoReturn:
    """Run a command's main with the process's arguments, and end the process.

    Bad input, and a machine that refuses a file, end with one sentence and the error's `exit_status` (1, or 3 for
    a training that diverged).

    Args:
        main: maps the arguments to an exit status.
        resumable: whether the same command continues, as a training's does: after a SIGTERM that `main` did not
            handle, the status is then `stopped_status()`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a workdir may have letters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    show_warning, show_thread = warnings.showwarning, threading.excepthook
    warnings.showwarning, threading.excepthook = _show_warning, _show_in_thread
    try:
        with ending_by_exception():
            try:
                status = main([_at_home(word) for word in sys.argv[1:]])
                barrier("the end")  # process 0 may still be writing
                sys.stdout.flush()
            except BaseException as error:
                status = _explain(error, resumable)
                if jax.distributed.is_initialized():
                    end_failed(error, status)
    finally:
        warnings.showwarning, threading.excepthook = show_warning, show_thread
    sys.exit(status)


def _explain(error: BaseException, resumable: bool) -> int:
    """Print a sentence about the error that ended the command and return the exit status; raise unexpected errors."""
    if isinstance(error, MPDiTError):
        _say(f"error: {error}")
        return error.exit_status
    if isinstance(error, KeyboardInterrupt):
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        _say(f"{number.name}: stopped; the same command continues:\n  {this_command()}")
        return stopped_status() if resumable and number == signal.SIGTERM else KILLED_BY + number
    if isinstance(error, MemoryError):
        _say(f"error: this machine's memory is too small ({first_line(error)}): choose a smaller batch or image.")
        return 1
    if isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and not _is_read(sys.stdout)):
        # The reader has gone, as with `| head`, or the terminal was closed. Python's own last flush must not fail too.
        for stream in (sys.stdout, *([] if _is_read(sys.stderr) else [sys.stderr])):
            _send_nowhere(stream)
        return KILLED_BY + signal.SIGPIPE
    if isinstance(error, OSError) and error.errno in REFUSALS:
        where = f" {error.filename}" if error.filename else ""
        _say(f"error: the system refused to read or write{where} ({error.strerror}).")
        try:
            sys.stdout.flush()
        except OSError:  # stdout itself was refused, and Python flushes it once more at the end
            _send_nowhere(sys.stdout)
        return 1
    if problem := _missing_platform(error):
        _say(f"error: {problem}")
        return 1
    if not isinstance(error, Exception) or not jax.distributed.is_initialized():
        raise error
    if may_be_lost(error):
        _say(
            f"error: another process may be lost ({first_line(error)}): JAX names it when its heartbeats are missed; "
            f"the same command on all machines continues:\n  {this_command()}"
        )
    else:
        traceback.print_exception(error)  # a fault of ours
    return 1


def _missing_platform(error: BaseException) -> str:
    """Return a sentence if an error says that JAX cannot use the platform of JAX_PLATFORMS here, else ""."""
    if not isinstance(error, AssertionError) and not str(error).startswith("Unable to initialize backend"):
        return ""  # an AssertionError is what a plugin that is not installed looks like
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as cause:
        platforms, why = jax.config.values.get("jax_platforms") or "", f" ({first_line(cause)})" if str(cause) else ""
        extra = install_extra("tpu" if "tpu" in platforms else "cuda")
        return f"JAX_PLATFORMS={platforms}: JAX cannot use this platform here{why}: {extra}, or set JAX_PLATFORMS=cpu."
    return ""


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _send_nowhere(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_read(stream: TextIO) -> bool:
    """Return whether a stream still has a reader: false for a pipe that broke and a terminal that was closed."""
    try:
        os.write(stream.fileno(), b"")
    except OSError as error:
        return error.errno not in LOST
    return True


def _at_home(word: str) -> str:
    """Replace `~` in `--flag=~/x` by the home folder: shells do so only at the beginning of a word."""
    flag, sign, value = word.partition("=")
    return f"{flag}={expand(value)}" if sign and flag.startswith("--") and value.startswith("~") else word


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our own warnings as one sentence, others as Python does."""
    ours = issubclass(category, DamageWarning | DataWarning | DeviceWarning | WeightsWarning)
    _say(f"warning: {message}" if ours else warnings.formatwarning(message, category, filename, lineno, line).rstrip())


def _show_in_thread(error: threading.ExceptHookArgs) -> None:
    """Print a sentence, not a traceback, if a thread may not write: TensorBoard's does, and the run goes on."""
    if isinstance(error.exc_value, OSError) and error.exc_value.errno in REFUSALS:
        _say(f"warning: TensorBoard's files are no longer written ({error.exc_value}); the run goes on.")
    else:
        threading.__excepthook__(error)
