"""What the commands share: their parsers, and errors as one sentence and a status."""

import argparse
import dataclasses
import gc
import logging
import os
import shlex
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

from mpdit_jax.distributed.peers import has_peers, leave
from mpdit_jax.distributed.waiting import barrier
from mpdit_jax.errors import DamageWarning, DataWarning, MPDiTError, first_line
from mpdit_jax.io.paths import REFUSALS, expand
from mpdit_jax.runtime.signals import KILLED_BY, LOST, Terminated, ending_by_exception, stopped_status, this_command


class Parser(argparse.ArgumentParser):
    """argparse with our way of saying what is wrong."""

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
    _silence_late_echoes()
    with ending_by_exception(), _quiet():
        before = threading.enumerate()
        status, failed = _status_of(main, resumable)
        if status:
            _let_end([thread for thread in threading.enumerate() if thread not in before and not thread.daemon])
    _end(status, failed)


def _end(status: int, failed: bool) -> NoReturn:
    try:
        together = leave(failed=failed)
    except KeyboardInterrupt:
        together = False
    if not together:
        # Some others are held up by what failed here. JAX would have this process wait for them, then print its stack.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _status_of(main: Callable[[Sequence[str]], int], resumable: bool) -> tuple[int, bool]:
    """Run `main`; whatever it ends by has become a sentence and a status, and whether others need not wait for it."""
    try:
        status = main([_at_home(word) for word in sys.argv[1:]])
        barrier("the end")  # the first one may still be writing
        sys.stdout.flush()
        return status, False
    except MPDiTError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status, True
    except KeyboardInterrupt as request:
        sigterm = isinstance(request, Terminated)
        name = "SIGTERM" if sigterm else "SIGINT"
        print(f"{name}: stopped; the same command continues:\n  {this_command()}", file=sys.stderr)
        if sigterm and resumable:
            return stopped_status(), True
        return KILLED_BY + (signal.SIGTERM if sigterm else signal.SIGINT), True
    except MemoryError as error:
        print(
            f"error: this machine's memory is too small ({first_line(error)}): choose a smaller batch or image.",
            file=sys.stderr,
        )
        return 1, True
    except OSError as error:
        if isinstance(error, BrokenPipeError) or not _somebody_reads(sys.stdout):
            # As with `| head`, or a terminal that was closed; keep the interpreter's last flush quiet as well.
            for stream in (sys.stdout, *([] if _somebody_reads(sys.stderr) else [sys.stderr])):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return KILLED_BY + signal.SIGPIPE, True
        if error.errno not in REFUSALS:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"error: the system refused to read or write{where} ({error.strerror}).", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # it is what was refused, and is flushed once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, True
    except Exception as error:  # a fault of ours, for which the other processes must not wait
        if not has_peers():
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        return 1, True


def _somebody_reads(stream: TextIO) -> bool:
    """Whether a stream is no terminal that was closed."""
    try:
        os.write(stream.fileno(), b"")
    except OSError as error:
        return error.errno not in LOST
    return True


def _at_home(word: str) -> str:
    """`--flag=~/x` with the home folder in place of `~`: shells do that for words that begin so, and for no others."""
    flag, sign, value = word.partition("=")
    return f"{flag}={expand(value)}" if sign and flag.startswith("--") and value.startswith("~") else word


def _silence_late_echoes() -> None:
    """Leave out what libraries print beside an error that becomes a sentence.

    To the end of the process, for that is how late they can be: a write that failed is told again when the interpreter
    clears away the coroutine that waited for it.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    if not isinstance(sys.unraisablehook, _UnlessTooLate):
        sys.unraisablehook = _UnlessTooLate(sys.unraisablehook)


@contextmanager
def _quiet() -> Iterator[None]:
    """Our own warnings are sentences, and so is what a thread cannot write."""
    show, hook = warnings.showwarning, threading.excepthook

    def in_one_line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, DamageWarning | DataWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = in_one_line
    threading.excepthook = _thread_in_one_line
    try:
        yield
    finally:
        warnings.showwarning = show
        threading.excepthook = hook


def _let_end(threads: Sequence[threading.Thread]) -> None:
    """Wait a little for what a failed command left running: threads that outlive the interpreter end in tracebacks."""
    for thread in threads:
        threading.Thread.join(thread, timeout=5)  # Orbax's own would raise again what has been told
    gc.collect()  # and so do half-run coroutines


@dataclasses.dataclass(frozen=True)
class _UnlessTooLate:
    """TensorStore prints a traceback for each read or write that ends after the first that failed; this does not."""

    hook: Callable[["sys.UnraisableHookArgs"], object]

    def __call__(self, error: "sys.UnraisableHookArgs") -> None:
        if str(error.exc_value) != "Event loop is closed":
            self.hook(error)


def _is_news(record: logging.LogRecord) -> bool:
    """Not what Orbax logs with a traceback, or leaves to asyncio: it raises the same, which becomes a sentence."""
    orbax = "orbax" in record.pathname or "exception was never retrieved" in record.getMessage()
    return not (record.levelno >= logging.ERROR and orbax)


def _thread_in_one_line(error: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread: a disk that refuses is no reason for a traceback, and the run goes on."""
    if isinstance(error.exc_value, OSError) and error.exc_value.errno in REFUSALS:
        print(f"warning: a file could not be written in the background ({error.exc_value}).", file=sys.stderr)
    else:
        threading.__excepthook__(error)
