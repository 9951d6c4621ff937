#!/usr/bin/env bash
# Asks the package index whether requirements.txt can be installed from ready-made wheels on every supported Python:
#
#   bash launch/check_requirements.sh
#
# Nothing is installed and those Pythons need not be here: pip resolves for each and stops. The conditions in
# requirements.txt (`; python_version < "3.12"`) are evaluated for the Python asked about. (One limit of pip's: those
# inside packages follow the Python that runs pip; CI installs on all for real.) PYTHON=... picks the Python that runs
# pip. Exit status: 0 all can, 1 one cannot, 2 there is no pip that can be asked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -m pip --version >/dev/null 2>&1; then
  printf "Error: '%s -m pip' does not run; set PYTHON to a Python that has pip.\n" "$python" >&2
  exit 2
fi

# The newest pip, from a folder of its own: older ones compare what libraries require of Python (jax: 3.12 or newer) with
# the Python that runs pip.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! "$python" -m pip download -q --disable-pip-version-check --no-deps --dest "$folder" 'pip>=26.3'; then
  printf 'Error: pip 26.3 or newer cannot be downloaded; pip says why above.\n' >&2
  exit 2
fi
pip=("$python" "$(echo "$folder"/pip-*.whl)/pip")

# requirements VERSION: the lines of requirements.txt that Python VERSION installs, without their conditions, which pip
# would evaluate for itself.
requirements() {
  "$python" - "$1" <<'PY'
import sys

try:
    from packaging.requirements import Requirement
except ImportError:  # every pip carries a copy
    from pip._vendor.packaging.requirements import Requirement

with open("requirements.txt") as file:
    lines = [line.strip() for line in file]
for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
    version = {"python_version": sys.argv[1], "python_full_version": sys.argv[1] + ".0"}
    if requirement.marker is None or requirement.marker.evaluate(version):
        requirement.marker = None
        print(requirement)
PY
}

status=0
for version in 3.11 3.12 3.13 3.14; do
  lines=$(requirements "$version")
  # --target is what lets pip resolve for another Python; --dry-run leaves it untouched.
  if "${pip[@]}" install -qq --dry-run --disable-pip-version-check --python-version "$version" \
    --only-binary=:all: --target /nonexistent -r /dev/stdin <<<"$lines"; then
    printf 'Python %s: requirements.txt resolves.\n' "$version"
  else
    printf 'Python %s: requirements.txt does NOT resolve; pip says why above.\n' "$version" >&2
    status=1
  fi
done
exit "$status"
