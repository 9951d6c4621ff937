"""What every command shares: its parser, and how it ends: by one sentence and an exit status."""

import argparse
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
from mpdit_jax.errors import DamageWarning, DataWarning, DeviceWarning, MPDiTError, first_line
from mpdit_jax.io.paths import REFUSALS, expand
from mpdit_jax.runtime.signals import KILLED_BY, LOST, Terminated, ending_by_exception, stopped_status, this_command

_RENAMED = {"--join_timeout": "--initialization_timeout"}  # flags of 0.1.0 by their names of today


class Parser(argparse.ArgumentParser):
    """argparse with our way of saying what is wrong."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; exit with status 2 for a flag that has another name since 0.1.0."""
        for word in args or ():
            if new := _RENAMED.get(word.partition("=")[0]):
                self.error(f"{word.partition('=')[0]} is {new} now")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one sentence and where to look, and exit with status 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def make_parser(command: str, description: str, examples: str, *, package: str = "mpdit_jax") -> Parser:
    """A parser for `python -m PACKAGE.COMMAND` whose help ends with examples.

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
    """How far a training has come that was asked to stop, and the line that continues it."""
    again = shlex.join([sys.executable, "-m", f"mpdit_jax.{command}", *arguments])
    saved = "saved" if step else "with nothing trained yet"
    return f"stopped at step {step} of {steps}, {saved}; continue with:\n  {again}"


def run(main: Callable[[Sequence[str]], int], *, resumable: bool = False) -> NoReturn:
    """Run a command's main with the process's arguments, and end the process.

    Bad input, and a machine that refuses a file, end with one sentence and the error's `exit_status` (1, or 3 for
    a training that diverged).

    Args:
        main: what the command does, from arguments to exit status.
        resumable: a training, which ends by a SIGTERM that `main` does not handle itself with `stopped_status`.
    """
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
    """Say in a sentence what has ended the command; its exit status. Raise what only a traceback explains."""
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
        # As with `| head`, or a terminal that was closed; keep the interpreter's last flush quiet as well.
        for stream in (sys.stdout, *([] if _is_read(sys.stderr) else [sys.stderr])):
            _send_nowhere(stream)
        return KILLED_BY + signal.SIGPIPE
    if isinstance(error, OSError) and error.errno in REFUSALS:
        where = f" {error.filename}" if error.filename else ""
        _say(f"error: the system refused to read or write{where} ({error.strerror}).")
        try:
            sys.stdout.flush()
        except OSError:  # it is what was refused, and is flushed once more at the end
            _send_nowhere(sys.stdout)
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


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _send_nowhere(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_read(stream: TextIO) -> bool:
    """Whether a stream is no pipe without a reader and no terminal that was closed."""
    try:
        os.write(stream.fileno(), b"")
    except OSError as error:
        return error.errno not in LOST
    return True


def _at_home(word: str) -> str:
    """`--flag=~/x` with the home folder in place of `~`: shells do that for words that begin so, and for no others."""
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
    """Our own warnings are sentences."""
    ours = issubclass(category, DamageWarning | DataWarning | DeviceWarning)
    _say(f"warning: {message}" if ours else warnings.formatwarning(message, category, filename, lineno, line).rstrip())


def _show_in_thread(error: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread: a disk that refuses is no reason for a traceback, and the run goes on."""
    if isinstance(error.exc_value, OSError) and error.exc_value.errno in REFUSALS:
        _say(f"warning: a file could not be written in the background ({error.exc_value}).")
    else:
        threading.__excepthook__(error)
