"""quickstart.sh, test.sh and .ci/run call the right commands and end properly when one fails or is stopped."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import STUB

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"]
LEFT_OUT = "Left out: the tests marked parity"
PYTEST = ["pytest", "-n", "3", "--dist=worksteal"]


def commands(checkout):
    return [call for call in checkout.modules() if call[0] not in ("venv", "pip")]


def test_test_sh_runs_the_judges_then_pytest_with_the_arguments(checkout):
    result = checkout.run("launch/test.sh", "-k", "two words", "tests/model")
    assert result.returncode == 0, result.stderr
    assert commands(checkout) == [
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["mypy"],
        [*PYTEST, "-k", "two words", "tests/model", "-m", "not parity"],
    ]
    assert result.stdout.count(LEFT_OUT) == 2
    assert result.stdout.rstrip().splitlines()[-1].startswith(LEFT_OUT)


def test_test_sh_joins_the_callers_marks_with_its_own(checkout):
    checkout.run("launch/test.sh", "-m", "not slow", "-x")
    assert commands(checkout)[-1] == [*PYTEST, "-x", "-m", "(not slow) and not parity"]


def test_test_sh_with_parity_leaves_nothing_out(checkout):
    result = checkout.run("launch/test.sh", "--parity", "-k", "two words")
    assert commands(checkout)[-1] == [*PYTEST, "-k", "two words"]
    assert LEFT_OUT not in result.stdout


def test_test_sh_passes_the_failure_on_and_still_says_what_it_left_out(checkout):
    result = checkout.run("launch/test.sh", STUB_PYTEST_STATUS="3")
    assert result.returncode == 3
    assert result.stdout.rstrip().splitlines()[-1].startswith(LEFT_OUT)


def python(version):
    """Return the stub as a Python of this version."""
    return STUB.replace("3.12", version)


def test_ci_runs_the_whole_suite(checkout):
    result = checkout.run(".ci/run")
    assert result.returncode == 0, result.stderr
    assert commands(checkout)[-1] == PYTEST
    assert [call[-1] for call in checkout.installs()] == [".[test,parity]"]
    assert "Python 3.12 ran the whole suite" in result.stdout
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("by_pyenv", [False, True])
def test_ci_then_runs_some_tests_with_the_newest_python(checkout, by_pyenv):
    checkout.install("python3", python("3.11"))
    checkout.install("python3.14", "#!/bin/sh\nexit 127\n")
    if by_pyenv:  # whose python3.13 is there, and does not run until it is selected
        checkout.install("python3.13", "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n")
        folder = checkout.names / "versions/3.13.1/bin"
        folder.mkdir(parents=True)
        checkout.install("python", python("3.13"), folder)
        answer = f'case $1 in versions) printf "3.12.9\\n3.13.0\\n3.13.1\\n" ;; root) echo "{checkout.names}" ;; esac'
        checkout.install("pyenv", f"#!/bin/sh\n{answer}\n")
    else:
        checkout.install("python3.13", python("3.13"))
    result = checkout.run(".ci/run")
    assert result.returncode == 0, result.stderr
    assert [call[-1] for call in checkout.installs()] == [".[test,parity]", ".[test]"]
    runs = [call for call in commands(checkout) if call[0] == "pytest"]
    paths = ["tests/model/test_golden.py", "tests/train/test_golden_adamw.py", "tests/config/test_stored_configs.py"]
    assert runs == [PYTEST, [*PYTEST, *paths, "tests/compatibility", "-m", "(not slow) and not parity"]]
    assert all((ROOT / path).exists() for path in paths)
    assert "Making .venv with Python 3.11" in result.stdout
    assert "Making .venv-newer with Python 3.13" in result.stdout


def test_ci_fails_when_a_newer_python_does(checkout):
    checkout.install("python3", python("3.11"))
    checkout.install("python3.14", python("3.14").replace("${STUB_PYTEST_STATUS:-0}", "3"))
    assert checkout.run(".ci/run").returncode == 3


def test_ci_says_that_it_found_no_newer_python(checkout):
    for name in ("python3", "python3.12", "python3.13", "python3.14"):
        checkout.install(name, python("3.11"))
    result = checkout.run(".ci/run")
    assert result.returncode == 0, result.stderr
    assert [call for call in commands(checkout) if call[0] == "pytest"] == [PYTEST]
    assert "Left out: the tests with the libraries of Python 3.12 and later" in result.stdout


def test_quickstart_trains_then_samples_then_says_where_things_are(checkout):
    result = checkout.run("launch/quickstart.sh")
    assert result.returncode == 0, result.stderr
    train, sample = commands(checkout)
    assert train == ["mpdit_jax.train", "--config=digits", "--workdir=runs/digits"]
    assert sample[0] == "mpdit_jax.sample"
    assert {"--workdir=runs/digits", "--guidance_scale=2.0", "--out=runs/digits/samples.png"} <= set(sample)
    ending = result.stdout.split("Done.")[1]
    for place in (str(checkout.root), "runs/digits/samples.png", "runs/digits/checkpoints", "runs/digits/tensorboard"):
        assert place in ending
    assert "--config=fashion_mnist" in ending


def test_quickstart_does_not_sample_after_a_failed_training(checkout):
    result = checkout.run("launch/quickstart.sh", STUB_TRAIN_STATUS="7")
    assert result.returncode == 7
    assert [call[0] for call in commands(checkout)] == ["mpdit_jax.train"]


@pytest.mark.parametrize(
    ("stop", "status"),
    [
        # The terminal's Ctrl-C reaches the training as well; a scheduler's SIGTERM may reach the script alone.
        (lambda process: os.killpg(process.pid, signal.SIGINT), 130),
        (lambda process: process.terminate(), 143),
    ],
    ids=["ctrl-c", "sigterm"],
)
def test_stopped_quickstart_lets_the_training_save_and_does_not_sample(checkout, stop, status):
    process = checkout.start("launch/quickstart.sh", STUB_TRAIN_WAITS="1")
    assert process.stdout is not None
    while process.stdout.readline() not in ("training\n", ""):
        pass
    stop(process)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert "saved" in out  # the training ended by itself, with success
    assert [call[0] for call in commands(checkout)] == ["mpdit_jax.train"]
    assert "To go on: bash '" in err


def test_quickstart_refuses_arguments(checkout):
    result = checkout.run("launch/quickstart.sh", "--steps=3")
    assert result.returncode == 1
    assert "takes no arguments, got '--steps=3'" in result.stderr
    assert checkout.modules() == []


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh"])
def test_help_explains_and_does_nothing(checkout, script):
    result = checkout.run(script, "--help")
    assert result.returncode == 0
    assert f"bash {script}" in result.stdout
    assert checkout.log.read_text() == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    linter = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert linter is not None, "shellcheck is missing: pip install -e '.[test]'"
    result = subprocess.run([linter, "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
