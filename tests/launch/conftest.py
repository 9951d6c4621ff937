"""Fixtures: a checkout in a folder with spaces, whose Python is a stub that records its arguments."""

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STUB = """#!/usr/bin/env bash
printf '%s\\n' "$(printf '%q ' "$@")" >>"$STUB_LOG"
case "$1 $2" in
  "-c "*version_info*) echo "${STUB_VERSION:-3.12}" ;;
  "-c import ensurepip, venv") exit "${STUB_VENV_MISSING:-0}" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip")
    printf '%s\\n' "${STUB_PIP_OUTPUT:-}"
    exit "${STUB_PIP_STATUS:-0}" ;;
  "-m mpdit_jax.train")
    if [ -n "${STUB_TRAIN_WAITS:-}" ]; then
      trap 'echo saved; exit 0' INT TERM
      echo training
      for _ in $(seq 100); do sleep 0.1; done
    fi
    exit "${STUB_TRAIN_STATUS:-0}" ;;
  "-m pytest") exit "${STUB_PYTEST_STATUS:-0}" ;;
esac
"""


class Checkout:
    """Runs the launch scripts of a copied checkout from another folder, with the stub for every Python name."""

    def __init__(self, base: Path) -> None:
        self.root = base / "a check out"
        self.log = base / "calls"
        names = base / "bin"
        elsewhere = base / "elsewhere"
        for folder in (self.root, names, elsewhere):
            folder.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        for name in ("requirements.txt", "setup.py"):
            shutil.copy(ROOT / name, self.root / name)
        self.names = names
        for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
            self.install(name, STUB)
        self.install("pyenv", "#!/bin/sh\nexit 1\n")
        self.elsewhere = elsewhere
        inherited = {
            name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV", "JAX_PLATFORMS")
        }
        self.environment = {**inherited, "PATH": f"{names}:{os.environ['PATH']}", "STUB_LOG": str(self.log)}

    def install(self, name: str, script: str, folder: Path | None = None) -> Path:
        """Put a command on the PATH, or into a folder."""
        path = (folder or self.names) / name
        path.write_text(script)
        path.chmod(0o755)
        return path

    def start(self, script: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
        self.log.write_text("")
        return subprocess.Popen(
            ["bash", str(self.root / script), *arguments],
            cwd=self.elsewhere,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell that runs the suite in the background has its commands ignore Ctrl-C, which no script can undo.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def run(self, script: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def modules(self) -> list[list[str]]:
        """Return the `python -m` calls of the last run as lists of words, the module first."""
        calls = [shlex.split(line) for line in self.log.read_text().splitlines()]
        return [call[1:] for call in calls if call[0] == "-m"]

    def installs(self) -> list[list[str]]:
        return [call for call in self.modules() if call[0] == "pip"]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)
