#!/usr/bin/env bash
# Runs what every change must pass: ruff, the type checker and the tests (all of them with --parity).
#
#   bash launch/test.sh [--parity] [pytest arguments]
#
# Makes or completes .venv with the extra [test] first. --parity adds the extra [parity] (PyTorch, diffusers, TFDS) and runs
# the tests that compare with them. The tests run in three processes, of which some wait (-n 0 for one). Paths in pytest
# arguments start at the repository's root; -m "not slow" leaves the long tests out. JAX runs on the CPU unless
# JAX_PLATFORMS says otherwise; PYTHON=... picks the Python (>= 3.11), VENV=... another folder than .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

case ${1:-} in -h | --help) print_header launch/test.sh && exit ;; esac

pytest_arguments=()
left_out=''
if [ "${1:-}" = --parity ]; then
  pytest_arguments=("${@:2}")
  prepare_environment test,parity
else
  # Deselected by name, not by what is installed, so that an earlier --parity changes nothing. pytest uses only the last
  # -m, so that a caller's expression is joined with ours.
  marks='not parity'
  while [ $# -gt 0 ]; do
    if [ "$1" = -m ] && [ $# -ge 2 ]; then
      marks="($2) and not parity"
      shift 2
    else
      pytest_arguments+=("$1")
      shift
    fi
  done
  pytest_arguments+=(-m "$marks")
  left_out='Left out: the tests marked parity, which compare with PyTorch and read TFDS; --parity installs it and runs them too.'
  prepare_environment test
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

run() {
  printf '\n> %s\n' "$*"
  "$VENV_PYTHON" -m "$@"
}

if [ -n "$left_out" ]; then echo "$left_out"; fi
run ruff check
run ruff format --check
run mypy
status=0
# Each process begins with its own part, since the tests of a file share what they compile.
# (bash 3.2 calls an empty array unset)
run pytest -n 3 --dist=worksteal ${pytest_arguments[@]+"${pytest_arguments[@]}"} || status=$?
if [ -n "$left_out" ]; then echo "$left_out"; fi
exit "$status"
