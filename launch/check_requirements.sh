#!/usr/bin/env bash
# Asks the package index whether requirements.txt can be installed from ready-made wheels on every supported Python:
#
#   bash launch/check_requirements.sh
#
# Nothing is installed and those Pythons need not be here: pip resolves for each and stops. (One limit of pip's: conditions
# like `python_version < "3.12"` inside packages follow the Python that runs pip; CI installs on all three for real.)
# PYTHON=... picks the Python that runs pip. Exit status: 0 all can, 1 one cannot, 2 pip is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -m pip --version >/dev/null 2>&1; then
  printf "Error: '%s -m pip' does not run; set PYTHON to a Python that has pip.\n" "$python" >&2
  exit 2
fi

status=0
for version in 3.11 3.12 3.13; do
  # --target is what lets pip resolve for another Python; --dry-run leaves it untouched.
  if "$python" -m pip install -qq --dry-run --disable-pip-version-check --python-version "$version" \
    --only-binary=:all: --target /nonexistent -r requirements.txt; then
    printf 'Python %s: requirements.txt resolves.\n' "$version"
  else
    printf 'Python %s: requirements.txt does NOT resolve; pip says why above.\n' "$version" >&2
    status=1
  fi
done
exit "$status"
