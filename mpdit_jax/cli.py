"""What the commands share: a config from the command line, and errors as one sentence."""

import argparse
import dataclasses
import functools
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
from operator import getitem
from typing import NoReturn, TextIO

from absl import flags
from ml_collections import ConfigDict, config_flags

from mpdit_jax.checks import suggest
from mpdit_jax.config import defaults, leave_out_idle
from mpdit_jax.errors import ConfigError, DamageWarning, MPDiTError
from mpdit_jax.files import REFUSALS, expand
from mpdit_jax.interrupt import KILLED_BY, Terminated, ending_by_exception, stopped_status, this_command
from mpdit_jax.model.presets import PRESETS
from mpdit_jax.peers import has_peers, leave
from mpdit_jax.waiting import wait_for_all

_CONFIG_HELP = """
config:
  --config=FILE          the experiment: a Python file with get_config(), such as configs/digits.py
  --config.FIELD=VALUE   any field of the config file, such as --config.optimizer.learning_rate=3e-4,
                         --config.batch_size=256 or --config.model.depths=4,8
"""
# What a person would call the types that config fields have.
_EXPECTED = {
    bool: "True or False",
    int: "a whole number, such as 8",
    float: "a number, such as 3e-4",
    tuple: "values with commas between them, such as 4,2",
}


class Parser(argparse.ArgumentParser):
    """argparse with our way of saying what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Print one sentence and where to look, and exit with status 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class ConfigParser(Parser):
    """A parser whose help lists the config's fields as well."""

    def format_help(self) -> str:
        """The help, and every `--config.FIELD` with its default."""
        fields = "\n".join(f"  --config.{path}={value}" for path, value in defaults().items())
        return (
            f"{super().format_help()}\nconfig fields and their defaults, before the file given as --config (None: from "
            f"model.preset, or the model's own default);\nmpdit_jax/config.py and mpdit_jax/model/config.py say what "
            f"each one means:\n{fields}\n"
        )


def make_parser(command: str, description: str, examples: str, *, config: bool = False) -> Parser:
    """A parser for `python -m mpdit_jax.COMMAND` whose help ends with examples."""
    return (ConfigParser if config else Parser)(
        prog=f"python -m mpdit_jax.{command}",
        description=textwrap.fill(description, 100),
        epilog=f"{_CONFIG_HELP if config else ''}\nexamples:\n{examples}",
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


def parse_with_config(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Parse a command that takes `--config=FILE` and `--config.FIELD=VALUE`; the parser must not define them.

    Raises:
        ConfigError: the file is missing or fails, an unknown field, or a value of the wrong type.
    """
    parsed, rest = parser.parse_known_args(arguments)
    rest = _one_word_each(rest)
    unknown = [argument for argument in rest if not argument.startswith(("--config", "--noconfig."))]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    if not any(argument.startswith("--config=") for argument in rest):
        parser.error("--config=FILE is needed, such as --config=configs/digits.py")
    _check_config_file(rest)
    try:
        config = _load_config(rest)
    except ConfigError:
        _explain_overrides(rest)
        raise
    _let_preset_win(config, rest)
    return parsed, config


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
        status = _status_of(main, resumable)
        if status:
            _let_end([thread for thread in threading.enumerate() if thread not in before and not thread.daemon])
    _end(status)


def _end(status: int) -> NoReturn:
    try:
        together = leave(failed=status != 0)
    except KeyboardInterrupt:
        together = False
    if not together:
        # Some others are held up by what failed here. JAX would have this process wait for them, then print its stack.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _status_of(main: Callable[[Sequence[str]], int], resumable: bool) -> int:
    """Run `main`; whatever it ends by has become a sentence and a status."""
    try:
        status = main([_at_home(word) for word in sys.argv[1:]])
        wait_for_all("the end")  # the first one may still be writing
        sys.stdout.flush()
        return status
    except MPDiTError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as request:
        sigterm = isinstance(request, Terminated)
        name = "SIGTERM" if sigterm else "SIGINT"
        print(f"{name}: stopped; the same command continues:\n  {this_command()}", file=sys.stderr)
        if sigterm and resumable:
            return stopped_status()
        return KILLED_BY + (signal.SIGTERM if sigterm else signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`; keep the interpreter's last flush quiet as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return KILLED_BY + signal.SIGPIPE
    except MemoryError as error:
        print(
            f"error: this machine's memory is too small ({_first_line(error)}): choose a smaller batch or image.",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"error: the system refused to read or write{where} ({error.strerror}).", file=sys.stderr)
        return 1
    except Exception as error:  # a fault of ours, for which the other processes must not wait
        if not has_peers():
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        return 1


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
        if issubclass(category, DamageWarning):
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


def _let_preset_win(config: ConfigDict, arguments: Sequence[str]) -> None:
    """A preset named on the command line decides its fields, unless they are named there too; the data decide sizes.

    What the config file says of parts that the preset's model does not have is left out.
    """
    given = {argument.partition("=")[0].removeprefix("--config.model.") for argument in arguments}
    if "preset" in given:
        with config.ignore_type():
            for name in set(PRESETS.get(config.model.preset, {})) - given - {"input_size"}:
                config.model[name] = None
        if config.model.preset in PRESETS:
            leave_out_idle(config.model, keep=given)


def _one_word_each(arguments: Sequence[str]) -> list[str]:
    """`--config.X V` as `--config.X=V`, and of a flag that is given twice the last: what flags of tuples and booleans
    would otherwise join or ignore.
    """
    words, flags_seen = list(arguments), dict[str, str]()
    while words:
        word = words.pop(0)
        if word.startswith("--config") and "=" not in word and words and not words[0].startswith("--"):
            word = f"{word}={words.pop(0)}"
        name = word.partition("=")[0]
        flags_seen.pop(name, None)
        flags_seen[name] = word
    return list(flags_seen.values())


def _load_config(arguments: Sequence[str]) -> ConfigDict:
    argv = ["", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = values["config"].value
    except Exception as error:  # a config file is the user's own code and can fail in any way
        raise ConfigError(f"{_config_file(arguments)}: {_first_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{_config_file(arguments)}: get_config() must return a ConfigDict, got {config!r}.")
    return config


def _check_names(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Raise ConfigError for a `--config.FIELD` that the config does not have."""
    for word in arguments:
        name = word.partition("=")[0]
        if not name.startswith(("--config.", "--noconfig.")):
            continue
        path, group = name.partition(".")[2], config
        for index, part in enumerate(path.split(".")):
            part = part.partition("[")[0]  # one entry of a tuple, as in --config.model.depths[0]
            if not isinstance(group, ConfigDict) or part not in group:
                inside = ".".join(["config", *path.split(".")[:index]])
                known = list(group) if isinstance(group, ConfigDict) else []
                fields = f"{inside} has {', '.join(known)}" if known else f"{inside} is a value, not a group of fields"
                raise ConfigError(f"unknown config key config.{path}{suggest(part, known)}: {fields}.")
            group = group[part]


def _explain_overrides(arguments: Sequence[str]) -> None:
    """Raise ConfigError for the `--config.FIELD=VALUE` that keeps a sound config file from being read."""
    file = [word for word in arguments if word.startswith("--config=")]
    config = _load_config(file)
    _check_names(config, arguments)
    for word in arguments:
        if word in file or "=" not in word:
            continue
        name, _, value = word.removeprefix("--").partition("=")
        *groups, field = name.partition("[")[0].split(".")[1:]
        group = functools.reduce(getitem, groups, config)
        if isinstance(group[field], ConfigDict):
            known = ", ".join(f"--{name}.{key}" for key in group[field])
            raise ConfigError(f"{name}={value}: {name} is a group of fields; set one of {known}.")
        expected = _EXPECTED.get(group.get_type(field))
        try:
            _load_config([*file, word])
        except ConfigError as error:
            if expected is None or "[" in name:
                raise
            raise ConfigError(f"{name}={value}: expected {expected}.") from error


def _check_config_file(arguments: Sequence[str]) -> None:
    path = _config_file(arguments).partition(":")[0]
    if not path.endswith(".py"):
        known = f"{path}.py" if os.path.isfile(f"{path}.py") else "configs/digits.py"
        raise ConfigError(f"--config={path}: expected a Python file, such as {known}.")
    if not os.path.isfile(path):
        raise ConfigError(f"--config={path}: no such file; configs/ has those that come with mpdit_jax.")


def _config_file(arguments: Sequence[str]) -> str:
    return next(word.removeprefix("--config=") for word in arguments if word.startswith("--config="))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error.args[0] if error.args else "").splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
