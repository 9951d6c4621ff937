"""A config from the command line: `--config=FILE`, `--config.FIELD=VALUE`, and what is wrong with either."""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from operator import getitem

from absl import flags
from ml_collections import ConfigDict, config_flags

from mpdit_jax.config.base import defaults, leave_out_idle
from mpdit_jax.errors import ConfigError, first_line
from mpdit_jax.model.presets import PRESETS
from mpdit_jax.runtime.cli import Parser, make_parser
from mpdit_jax.validation import suggest

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


class ConfigParser(Parser):
    """A parser whose help lists the config's fields as well."""

    def format_help(self) -> str:
        """The help, and every `--config.FIELD` with its default."""
        fields = "\n".join(f"  --config.{path}={value}" for path, value in defaults().items())
        return (
            f"{super().format_help()}\nconfig fields and their defaults, before the file given as --config (None: from "
            f"model.preset, or the model's own default);\nmpdit_jax/config/base.py and mpdit_jax/model/config.py say "
            f"what each one means:\n{fields}\n"
        )


def make_config_parser(command: str, description: str, examples: str) -> Parser:
    """A parser for `python -m mpdit_jax.COMMAND` that takes a config, see `parse_with_config`."""
    return make_parser(command, description, examples, kind=ConfigParser, before_examples=_CONFIG_HELP)


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
    sys.modules.pop("config_config", None)  # or the file would be run inside what an earlier one has left
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = values["config"].value
    except Exception as error:  # a config file is the user's own code and can fail in any way
        raise ConfigError(f"{_config_file(arguments)}: {first_line(error)}") from error
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
