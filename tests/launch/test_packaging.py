"""requirements.txt, setup.py and the tools' files agree with each other and with the package index; wheels work."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tiny import OPTIMIZED, OVERRIDES, digits_file

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


def test_the_image_is_made_of_what_there_is(setup_arguments):
    """The Dockerfile copies files that exist, all that an installation reads, and its extras and Python are ours."""
    text = (ROOT / "launch/Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert {"requirements.txt", "setup.py", "pyproject.toml", "README.md", "mpdit_jax", "configs"} <= {*copied}
    extras = {*re.findall(r"EXTRA=(\w+)", text), *re.findall(r"^# EXTRA is (\w+).*, (\w+) or (\w+)\.", text, re.M)[0]}
    assert extras <= {*setup_arguments["extras_require"]}
    assert re.findall(r"^FROM python:([\d.]+)", text, re.M)[0] in PYTHONS


def test_only_the_package_is_packaged(setup_arguments):
    packages, folders = setup_arguments["packages"], setup_arguments["package_dir"]
    assert "mpdit_jax" in packages
    assert {name.split(".")[0] for name in packages} == {"mpdit_jax"}
    with_code = {path.parent for path in (ROOT / "mpdit_jax").rglob("*.py")}
    assert {ROOT / folders.get(name, name.replace(".", "/")) for name in packages} == {*with_code, ROOT / "configs"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the repository's files, their sdist, and the wheel that is built from the sdist; without a network."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a clone: which files belong to the repository is not known")
    names = {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for name in names:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, clone / name)
    script = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(out)], cwd=clone, capture_output=True, check=True)
    (sdist,) = out.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, f"--wheel-dir={out}", str(sdist)], cwd=out, check=True)
    (wheel,) = out.glob("*.whl")
    return names, sdist, wheel


def test_a_wheel_has_the_package_and_the_configs_alone(built):
    names, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {name for name in names if name.startswith("mpdit_jax/")}
    assert packed == expected | {f"mpdit_jax/{name}" for name in names if name.startswith("configs/")}
    assert {"mpdit_jax/py.typed", "mpdit_jax/configs/digits.py"} <= packed


def test_an_sdist_has_every_file_of_the_repository(built):
    names, sdist, _ = built
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert names <= packed
    assert {name for name in packed - names if ".egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_commands_work_from_a_wheel_outside_a_checkout(built, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", f"--target={site}", str(built[2])]
    subprocess.run(pip, check=True)

    def python(*arguments):
        environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)

    assert python("-c", "import mpdit_jax; print(mpdit_jax.__file__)").stdout.startswith(str(site))
    data = ["--config.data.name=arrays", f"--config.data.path={digits_file()}"]
    train = ["--config=digits", "--workdir=run", *data, *OVERRIDES, "--config.steps=2"]
    done = python("-m", "mpdit_jax.train", *train)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "run/checkpoints/2").is_dir()
    refused = python("-m", "mpdit_jax.train", "--config=configs/digits.py", "--workdir=other")
    assert refused.stderr == "error: --config=configs/digits.py: no such file; mpdit_jax ships --config=digits.\n"
    listed = python("-m", "mpdit_jax.configs.ablation", "--list")
    assert "  time_linear_2 " in listed.stdout
    package = site / "mpdit_jax"
    modules = [path.stem for path in package.glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    commands = sorted([*modules, *(path.parent.name for path in package.glob("*/__main__.py"))])
    assert {"train", "tables", "train_vae"} <= set(commands)
    for command in commands:
        done = python("-m", f"mpdit_jax.{command}", "--help")
        assert (done.returncode, done.stderr) == (0, ""), command
        assert done.stdout.startswith(f"usage: python -m mpdit_jax.{command}")


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
