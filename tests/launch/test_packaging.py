"""requirements.txt, setup.py and the tools' files agree with each other and with the package index."""

import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tiny import OPTIMIZED

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


@pytest.fixture(scope="module")
def setup_arguments():
    with pytest.MonkeyPatch.context() as patch, mock.patch("setuptools.setup") as setup:
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    return setup.call_args.kwargs


def pins():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def applies(requirement, python):
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_is_exact_and_within_the_range_of_setup_py(setup_arguments, python):
    # requirements.txt brings the one extra that the package itself imports, too.
    required = [*setup_arguments["install_requires"], *setup_arguments["extras_require"]["adaptive"]]
    ranges = {canonicalize_name(r.name): r for r in map(Requirement, required)}
    pinned = [pin for pin in pins() if applies(pin, python)]
    assert sorted(canonicalize_name(pin.name) for pin in pinned) == sorted(ranges)  # one pin each
    for pin in pinned:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert ranges[canonicalize_name(pin.name)].specifier.contains(specifier.version), pin


def test_only_the_package_is_packaged(setup_arguments):
    packages = setup_arguments["packages"]
    assert "mpdit_jax" in packages
    assert {name.split(".")[0] for name in packages} == {"mpdit_jax"}
    with_code = {path.parent for path in (ROOT / "mpdit_jax").rglob("*.py")}
    assert {ROOT.joinpath(*name.split(".")) for name in packages} == with_code


def test_pre_commit_uses_the_ruff_that_is_pinned(setup_arguments):
    (ruff,) = [r for r in map(Requirement, setup_arguments["extras_require"]["test"]) if r.name == "ruff"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = [r for r in hooks["repos"] if r["repo"].endswith("ruff-pre-commit")]
    assert str(ruff.specifier) == "==" + repository["rev"].removeprefix("v")


def test_ci_covers_every_supported_python(setup_arguments):
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == PYTHONS
    prefix = "Programming Language :: Python :: "
    assert [c.removeprefix(prefix) for c in setup_arguments["classifiers"] if c.startswith(prefix)] == PYTHONS
    assert jobs["test"]["steps"][-1]["run"] == "bash launch/test.sh"
    assert jobs["parity"]["steps"][-1]["run"] == "bash launch/test.sh --parity"


@pytest.mark.parametrize(("job", "needed"), [
    ("tpu", ["-e '.[test,tpu]'"]),
    ("slurm", ["slurm-wlm", "munge", "procps"]),
    ("optimized", ["-e '.[test]'"]),
    ("tree", ["-e '.[test]'"]),
])  # fmt: skip
def test_ci_has_what_some_tests_are_skipped_without_and_some_are_run_twice(job, needed):
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    *before, last = (step["run"] for step in jobs[job]["steps"] if "run" in step)
    assert any(all(name in command for name in needed) for command in before)
    command, *arguments = last.split()
    assert Path(command).name == "pytest"
    paths = [argument for argument in arguments if argument.startswith("tests/")]
    assert paths
    assert all((ROOT / path).exists() for path in paths)


def test_ci_compiles_as_users_do_once():
    variables = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["optimized"]["env"]
    assert variables == OPTIMIZED


@pytest.mark.slow
def test_requirements_resolve_on_every_supported_python(tmp_path, monkeypatch):
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--no-deps", "--retries=0"]
    probe = subprocess.run([*pip, "--target", str(tmp_path), "absl-py"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no package index within reach: {probe.stderr.strip().splitlines()[-1:]}")
    monkeypatch.setenv("PYTHON", sys.executable)
    script = ["bash", str(ROOT / "launch/check_requirements.sh")]
    result = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [line.split()[1].rstrip(":") for line in result.stdout.splitlines()] == PYTHONS
