"""The site of docs/ has every page in its navigation, working links, and true statements about the code."""

import importlib
import re
import runpy
import shlex
from pkgutil import resolve_name

import pytest
import yaml

import mpdit_jax as mp
from mpdit_jax import errors
from mpdit_jax.config import flags, resolve
from mpdit_jax.evaluate import __main__ as evaluate
from mpdit_jax.runtime.cli import Parser
from mpdit_jax.sample.options import reject_unused_flags, sampler_from
from mpdit_jax.sample.outputs import ROWS
from tests.house import room_imports
from tests.tiny import ROOT, command_main

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PICTURES = runpy.run_path(str(DOCS / "plots/house.py"))


WITH_COMMANDS = [*(f"docs/{page}" for page in PAGES), "README.md", "launch/quickstart.sh"]
WITH_COMMANDS += [
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("configs/*.py"), *ROOT.glob("mpdit_jax/**/*.py"))
    if "python -m" in path.read_text() and (path.parts[-2] == "configs" or "_EXAMPLES" in path.read_text())
]
FILLED = {"NAME": "mpdit_b_k4", "$batch": "8", "$attention": "xla", "$workdir": "runs/digits"}  # what a reader fills in


def commands(text):
    """(module, arguments) of every command line of this package that a text shows."""
    for line in re.findall(r'(?:python3?|\$VENV_PYTHON"?) -m (mpdit_jax\.[^`\n]*)', re.sub(r"\\\n\s*", " ", text)):
        module, *words = shlex.split(line.partition(" > ")[0], comments=True) if "--help" not in line else [""]
        if words:
            for placeholder, value in FILLED.items():
                words = [word.replace(placeholder, value) for word in words]
            yield module.removeprefix("mpdit_jax."), words


def parsed(command, words, monkeypatch):
    """The options, and the config or None, that the command's own parser returns; the command is not run."""

    class Parsed(Exception):
        pass

    def stop(*found):
        raise Parsed(*found)

    main = command_main(command)
    if command == "benchmark":
        main, words = importlib.import_module(f"mpdit_jax.benchmark.{words[0]}").main, words[1:]
    parse_args = Parser.parse_args
    with monkeypatch.context() as patched:
        patched.setattr(Parser, "parse_args", lambda *given: stop(parse_args(*given), None))
        patched.setattr(
            f"{main.__module__}.parse_with_config", lambda *given: stop(*flags.parse_with_config(*given)), raising=False
        )
        with pytest.raises(Parsed) as found:
            main(words)
    return found.value.args


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_are_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text()
    if page.startswith("mpdit_jax/"):  # the examples of a command's help
        text = text.partition('_EXAMPLES = """')[2].partition('"""')[0]
    classes = {}  # of the runs that the page makes
    for command, words in commands(text):
        options, config = parsed(command, words, monkeypatch)
        if command in ("train", "convert") and config is not None:
            classes[getattr(options, "workdir", None) or options.out] = config.model.num_classes
        if command in ("train", "compile"):
            resolve(config)
        elif command in ("sample", "export"):
            sampler_from(options)
            reject_unused_flags(options)
            if options.out.endswith(".png") and options.labels == "balanced" and not options.num_samples:
                assert classes.get(options.workdir, 0) <= ROWS, f"{options.out} of {options.workdir} needs --labels"
        elif command == "evaluate":
            evaluate.check_flags(options, words)


@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if page not in ("docs/soak.md", "docs/start.md")])
def test_a_page_gives_the_configs_by_the_names_that_work_from_a_wheel_as_well(page):
    """Start explains the other way; the page of the soak is the record of a run."""
    assert "--config=configs/" not in (ROOT / page).read_text()


def named(nav):
    """Return the pages in a navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in named(item)]


def test_the_navigation_has_every_page_once():
    assert sorted(named(SITE["nav"])) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_what_it_is_for(page):
    title, _, start, *_ = (DOCS / page).read_text().splitlines()
    assert title.startswith("# ")
    assert start.startswith(("This page ", "This site "))


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_pages_headings_and_pictures(page):
    """mkdocs, where it is installed, finds no broken link, and mkdocstrings finds the names of the Python reference."""
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", (DOCS / page).read_text()):
        path, _, heading = link.partition("#")
        target = (DOCS / page).parent / path if path else DOCS / page
        assert target.is_file(), link
        assert target.is_relative_to(DOCS), f"{link} is not part of the site"
        if heading and not heading.startswith("mpdit_jax."):
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_pages_that_the_code_names_exist():
    files = [path for folder in ("mpdit_jax", "configs", "studies", "launch") for path in (ROOT / folder).rglob("*.*")]
    texts = [path.read_text() for path in files if path.suffix in {".py", ".sh", ".sbatch", ".yaml"}]
    names = {name for text in texts for name in re.findall(r"docs/\w+\.md", text)}
    assert len(names) > 3
    assert sorted(name for name in names if not (ROOT / name).is_file()) == []


def test_the_python_reference_has_every_public_name_and_no_other():
    page = (DOCS / "python.md").read_text()
    assert [name for name in mp.__all__ if not re.search(rf"\b{name}\b", page)] == []
    for path in re.findall(r"^::: (\S+)$", page, re.M):
        resolve_name(path)
    members = re.findall(r"^ +- (\w+)$", page, re.M)
    assert members == [name for name, value in vars(errors).items() if isinstance(value, type)]


def test_the_picture_of_the_house_is_that_of_the_imports():
    """The picture has every folder, and none imports from a row above its own."""
    rows = {name: row for row, (_, rooms) in enumerate(PICTURES["HOUSE"]) for name in rooms}
    imports = room_imports()
    assert rows.keys() == imports.keys()
    upwards = [link for name, others in imports.items() for other in others if rows[other] < rows[name]
               for link in others[other]]  # fmt: skip
    assert upwards == []


@pytest.mark.parametrize("name", ["house", "batch"])
def test_the_pictures_are_what_the_script_draws(name):
    assert (DOCS / f"images/{name}.svg").read_text() == PICTURES[name]()


def test_ci_builds_the_site_strictly():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["docs"]["steps"][-1]["run"] == "mkdocs build --strict"


def test_the_files_that_the_architecture_page_names_exist():
    page = (DOCS / "architecture.md").read_text()
    missing = [name for name in re.findall(r"`(\w+/(?:\w+/)*\w+\.(?:py|svg))`", page)
               if not (ROOT / "mpdit_jax" / name).is_file() and not (ROOT / name).is_file()]  # fmt: skip
    for first, second in re.findall(r"^\| (.+?) \| (.+?) \|$", page, re.M):
        folders = [ROOT / "mpdit_jax" / folder for folder in re.findall(r"`(\w+)`", first)]
        if folders and folders[0].is_dir():
            names = re.findall(r"`(\w+\.py)`", second)
            missing += [name for name in names if not any((folder / name).is_file() for folder in folders)]
    assert missing == []
