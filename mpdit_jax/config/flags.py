"""The one parser of `--config=FILE` and `--config.FIELD=VALUE`, for every command that takes a config."""

import argparse
import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import tuple_parser

from mpdit_jax.config.ablation import ABLATIONS
from mpdit_jax.config.base import base_config, clear_unused
from mpdit_jax.config.checks import leaves
from mpdit_jax.errors import ConfigError, first_line
from mpdit_jax.io.paths import check_local
from mpdit_jax.model.presets import PRESETS
from mpdit_jax.runtime.cli import Parser, make_parser
from mpdit_jax.validation import suggest

_HELP = """
config:
  --config=NAME          the experiment, of those that mpdit_jax ships:
{names}
  --config=FILE          or a Python file with get_config(); FILE:TEXT calls get_config("TEXT")
  --config.FIELD=VALUE   any field of the config, such as --config.optimizer.learning_rate=3e-4,
                         --config.batch_size=256 or --config.model.depths=4,8
"""

# How the text of an override becomes a value of the field's type, and what a person would call such a value.
_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (flags.BooleanParser().parse, "True or False"),
    int: (flags.IntegerParser().parse, "a whole number, such as 8"),
    float: (flags.FloatParser().parse, "a number, such as 3e-4"),
    str: (str, "text"),
    tuple: (tuple_parser.TupleParser().parse, "values with commas between them, such as 4,2"),
}


def make_config_parser(
    command: str, description: str, examples: str, base: Callable[[], ConfigDict] = base_config
) -> Parser:
    """Return a parser for `python -m mpdit_jax.COMMAND` that takes a config, see `parse_with_config`.

    Its help lists every field of `base()` with its default.
    """
    fields = "\n".join(f"  --config.{path}={value}" for path, value in leaves(base().to_dict()))
    shipped = [name if name != "ablation" else "ablation:ROW" for name in shipped_configs()]
    names = textwrap.fill(", ".join(shipped), 95, initial_indent=25 * " ", subsequent_indent=25 * " ")
    parser = make_parser(command, description, examples)
    parser.epilog = (
        f"{_HELP.format(names=names)}{parser.epilog}\nconfig fields and their defaults, before the file of --config "
        "(None: from model.preset, or the model's own default);\n"
        f"{base.__module__.replace('.', '/')}.py and mpdit_jax/model/config.py say what each one means:\n{fields}"
    )
    return parser


def parse_with_config(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Parse a command that takes `--config=FILE` and `--config.FIELD=VALUE`; the parser must not define them.

    Raises:
        ConfigError: the file is missing or fails, an unknown field, or a value of the wrong type.
    """
    parsed, words = parser.parse_known_args(arguments)
    file, overrides = split_config_words(parser, words)
    if file is None:
        parser.error("--config=FILE is needed, such as --config=digits")
    config = load_config_file(file)
    for path, text in overrides.items():
        _override(config, path, text)
    _let_preset_win(config, overrides)
    return parsed, config


def split_config_words(parser: Parser, words: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Return the value of `--config` or None, and the text of each `--config.PATH` by its path; the last one wins.

    Any other word ends the command by the parser's error.
    """
    left, given = list(words), dict[str, str]()
    while left:
        name, sign, value = left.pop(0).partition("=")
        if name != "--config" and not name.startswith("--config."):
            parser.error(f"unknown argument {name + sign + value!r}")
        if not sign:
            if not left or left[0].startswith("--"):
                parser.error(f"{name} has no value: write {name}=VALUE")
            value = left.pop(0)
        given[name] = value
    return given.pop("--config", None), {name.removeprefix("--config."): value for name, value in given.items()}


def load_config_file(value: str) -> ConfigDict:
    """Return the config of `--config=VALUE`: the result of `get_config()`, or of `get_config("TEXT")` for `FILE:TEXT`.

    Args:
        value: a Python file, which may import its neighbours, or the name of a config that mpdit_jax ships.

    Raises:
        ConfigError: the file is missing, fails, or returns something else.
    """
    file, texts = _find_file(value)
    spec = importlib.util.spec_from_file_location("config_file", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["config_file"] = importlib.util.module_from_spec(spec)
    folder = os.path.dirname(os.path.abspath(file))
    sys.path.insert(0, folder)
    before = {*sys.modules}
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*texts)
    except Exception as error:  # a config file is the user's own code and can fail in any way
        problem = first_line(error)
        if "relative import" in problem:
            problem = "a config imports its neighbour by name, `import other` for other.py, and not by `from . import`"
        raise ConfigError(f"--config={value}: {problem}") from error
    finally:
        sys.path.remove(folder)
        # A config of another folder may have a neighbour of the same name.
        for name in {*sys.modules} - before:
            origin = getattr(sys.modules[name], "__file__", None)  # modules of C code and namespaces have none
            if origin is not None and os.path.dirname(os.path.abspath(origin)) == folder:
                del sys.modules[name]
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={value}: get_config() must return a ConfigDict, got {config!r}.")
    return config.lock()


def shipped_configs() -> dict[str, str]:
    """Return the files of the shipped configs by name. A wheel has them in the package, a clone beside it."""
    package = Path(__file__).parents[1]
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.stem: str(path) for path in sorted(folder.glob("*.py"))}


def _find_file(value: str) -> tuple[str, list[str]]:
    """Return the file of `--config=VALUE` and what its `get_config` is called with."""
    check_local(value, ConfigError)
    path, colon, text = value.partition(":")
    folder, name = os.path.split(path.removesuffix(".py"))
    shipped = shipped_configs()
    if os.path.basename(folder) == "ablations" and name in ABLATIONS and not os.path.exists(path):
        print(f"--config={value} is written --config=ablation:{name} now", file=sys.stderr)
        return shipped["ablation"], [name]
    if path in shipped:
        return shipped[path], [text] if colon else []
    if path.endswith(".py") and os.path.isfile(path):
        return path, [text] if colon else []
    problem = "no such file" if path.endswith(".py") else "expected a Python file or the name of a shipped config"
    if name in shipped:
        raise ConfigError(f"--config={value}: {problem}; mpdit_jax ships --config={name}{colon}{text}.")
    raise ConfigError(f"--config={value}: {problem}{suggest(path, shipped)}; mpdit_jax ships {', '.join(shipped)}.")


def _override(config: ConfigDict, path: str, text: str) -> None:
    """Set the field at `path`, such as "optimizer.learning_rate", to what `text` means for its type."""
    group, value, inside, name = config, config, "config", "config"
    for part in path.split("."):
        group, inside, name = value, name, f"{name}.{part}"
        if not isinstance(group, ConfigDict):
            raise ConfigError(f"unknown config key config.{path}: {inside} is a value, not a group of fields.")
        if part not in group:
            known = list(group)
            raise ConfigError(
                f"unknown config key config.{path}{suggest(part, known)}: {inside} has {', '.join(known)}."
            )
        value = group[part]
    if isinstance(value, ConfigDict):
        fields = ", ".join(f"--{name}.{key}" for key in value)
        raise ConfigError(f"{name}={text}: {name} is a group of fields; set one of {fields}.")
    read, expected = _READERS.get(group.get_type(part), _READERS[str])
    try:
        group[part] = read(text)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}={text}: expected {expected}.") from error


def _let_preset_win(config: ConfigDict, overrides: Mapping[str, str]) -> None:
    """Let a preset of the command line replace the file's model, except for fields that the command line sets too.

    `input_size` stays the file's, since the data decide it. Fields that the preset's model does not use are cleared.
    """
    preset = PRESETS.get(overrides.get("model.preset", ""))
    if preset is not None:
        given = {path.removeprefix("model.") for path in overrides}
        with config.ignore_type():
            config.model.update(dict.fromkeys({*preset} - given - {"input_size"}))
        clear_unused(config.model, keep=given)
