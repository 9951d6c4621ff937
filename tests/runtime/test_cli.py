"""Every command refuses URLs, platforms and systems that it cannot use, and prints in any encoding."""

import importlib
import io
import runpy
import sys
from pathlib import Path

import jax
import pytest

import mpdit_jax as mp
from mpdit_jax.config import base_config
from mpdit_jax.config.base import resolve
from mpdit_jax.config.flags import load_config_file
from mpdit_jax.errors import ConfigError, InputError, MPDiTError
from mpdit_jax.io.atomic import atomic_write
from mpdit_jax.runtime import signals
from mpdit_jax.runtime.cli import Parser, run
from tests.house import modules
from tests.tiny import refusal

MAINS = sorted(name for name, path in modules().items() if "\n    run(main" in path.read_text())
COMMANDS = [(name, []) for name in MAINS] + [("mpdit_jax.benchmark.__main__", [what]) for what in ("data", "train")]


class Parsing(Exception):
    """Carries the parser of a command that begins to parse."""


def test_every_command_is_found():
    assert len(MAINS) >= 11


@pytest.mark.parametrize(("name", "first"), COMMANDS)
def test_no_flag_takes_a_url(name, first):
    """Every flag that a command's parser lists refuses a URL, which would otherwise become a folder `gs:`."""
    main = importlib.import_module(name).main

    def begin(parser, args=None, namespace=None):
        if first and args == first:  # which benchmark
            return parse(parser, args, namespace)
        raise Parsing(parser)

    parse = Parser.parse_known_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", begin)
        with pytest.raises(Parsing) as begun:
            main(first)
    (parser,) = begun.value.args
    for flag in [flag for action in parser._actions if action.nargs != 0 for flag in action.option_strings]:
        with pytest.raises(InputError, match=f"^{flag}=gs://bucket/x: expected a folder or file that this machine"):
            main([*first, f"{flag}=gs://bucket/x"])


@pytest.mark.parametrize(
    "word",
    ["s3://b/x", "https://host/x", "hf://me/x", "hdfs:/x", "file:///x", "--images=idx:gs://b", "--a=classifier:S3://x"],
)
def test_what_is_a_url(word):
    with pytest.raises(InputError, match="not a URL"):
        Parser().parse_known_args([word])


def test_what_is_no_url():
    words = [
        "--vae=stabilityai/sd-vae-ft-ema",
        "--out=a:b/c",
        "--samples=data:digits:train",
        "--address=[::1]:80",
        "//x",
    ]
    assert Parser().parse_known_args(words)[1] == words


def test_urls_elsewhere(tmp_path, monkeypatch):
    """A URL is refused in a config, and as a path from Python."""
    config = base_config()
    config.data.path = "gs://bucket/data"
    with pytest.raises(ConfigError, match=r"config\.data.path=gs://bucket/data: expected"):
        resolve(config)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="gs:/bucket/x: expected a folder"), atomic_write(Path("gs://bucket/x")):
        pass
    url = "gs://bucket/x.safetensors"
    for open_url in (
        mp.load_checkpoint, mp.load_torch, mp.load_vae, lambda url: mp.train(base_config(), url),
        lambda url: mp.generate(url, 1), load_config_file,
    ):  # fmt: skip
        with pytest.raises(MPDiTError, match=r"gs:/+bucket/x\.safetensors: expected a folder or file"):
            open_url(url)
    assert not list(tmp_path.iterdir())


UNKNOWN = "Unable to initialize backend 'x': no such backend"


# The first is what JAX raises for cuda without its plugin.
@pytest.mark.parametrize(("error", "why"), [(AssertionError(), ""), (RuntimeError(UNKNOWN), f" ({UNKNOWN})")])
def test_a_platform_that_jax_cannot_use(error, why, monkeypatch, capsys):
    def refuse():
        raise error

    monkeypatch.setattr(jax, "devices", refuse)
    sentence = refusal(lambda arguments: jax.devices(), [], monkeypatch, capsys)
    assert sentence.startswith(
        f"JAX_PLATFORMS=cpu: JAX cannot use this platform here{why}: install mpdit_jax with its "
    )


def test_an_assertion_of_our_own_keeps_its_traceback(monkeypatch):
    def fail(arguments):
        raise AssertionError("a bug")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(AssertionError, match="a bug"):
        run(fail)


def test_letters_that_the_terminal_lacks(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit):
        run(lambda arguments: print("runs/Bücher"))
    assert stdout.buffer.getvalue() == b"runs/B\\xfccher\n"


def test_a_system_that_is_not_supported(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.name", "nt")
        with pytest.raises(ImportError, match="runs on Linux, macOS and Windows' WSL"):
            runpy.run_path(signals.__file__)
