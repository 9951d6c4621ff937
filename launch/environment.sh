# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh; keeps to what bash 3.2 (macOS) knows.
#
#   prepare_environment EXTRAS    EXTRAS: names from setup.py with commas between, or ''
#
# Run in the repository's root. Makes .venv with a Python >= 3.11, installs requirements.txt and mpdit_jax with the
# extras, after which VENV_PYTHON runs. What is installed already is left alone. PYTHON=... picks the Python, VENV=...
# another folder than .venv.

VENV=${VENV:-.venv}
VENV_PYTHON=$VENV/bin/python
UNFINISHED=$VENV/mpdit_jax.unfinished # there from before .venv is made until its first installation is complete
STAMP=$VENV/mpdit_jax.installed       # what the last complete installation was made from
PIP_LOG=$VENV/pip.log

# Huge pages where the system leaves them to whoever asks: XLA's arrays on a CPU (mpdit_jax/runtime/hugepages.py). Read by glibc
# from 2.35 on when a process starts, ignored by everything else.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

fail() {
  printf 'Error: %s\n' "$*" >&2
  exit 1
}

# print_header SCRIPT: the comment a script opens with, which is its --help.
print_header() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"
}

# python_version COMMAND: prints its "major.minor", or nothing when it does not run.
python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# at_least VERSION MAJOR MINOR
at_least() {
  local major=${1%%.*} minor=${1#*.}
  [ "$major" -gt "$2" ] || { [ "$major" -eq "$2" ] && [ "$minor" -ge "$3" ]; }
}

# Sets PYTHON: the caller's, else the first of the usual names that is tested, else a newer one.
find_python() {
  local candidate version newer='' old=''
  if [ -n "${PYTHON:-}" ]; then
    version=$(python_version "$PYTHON")
    [ -n "$version" ] || fail "PYTHON=$PYTHON does not run; set it to the command or path of a Python 3.11 or newer."
    at_least "$version" 3 11 ||
      fail "PYTHON=$PYTHON is Python $version, but mpdit_jax needs 3.11 or newer; set PYTHON to a newer one."
    return
  fi
  for candidate in python3 python3.13 python3.14 python3.12 python3.11; do
    version=$(python_version "$candidate")
    [ -n "$version" ] || continue
    if ! at_least "$version" 3 11; then
      old="${old:+$old, }$candidate is $version"
    elif at_least "$version" 3 15; then
      newer=${newer:-$candidate}
    else
      PYTHON=$candidate
      return
    fi
  done
  [ -n "$newer" ] ||
    fail "mpdit_jax needs Python 3.11 or newer, but found ${old:-no python3 on the PATH};" \
      "install one, or set PYTHON=/path/to/python3."
  PYTHON=$newer
  printf '%s is Python %s; tested are 3.11 to 3.14 (PYTHON=... picks another).\n' \
    "$PYTHON" "$(python_version "$PYTHON")"
}

make_venv() {
  local version
  find_python
  version=$(python_version "$PYTHON")
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python $version cannot make virtual environments, since its venv module is missing or incomplete;" \
      "on Debian and Ubuntu 'sudo apt install python$version-venv' (or python3-venv) brings it. Then run this again."
  printf 'Making %s with Python %s ...\n' "$VENV" "$version"
  mkdir "$VENV"
  : >"$UNFINISHED"
  "$PYTHON" -m venv "$VENV" || fail "'$PYTHON -m venv $VENV' failed; its message is above."
}

# Refuses a .venv that was made by other hands and cannot be used; it is the user's, so it is not removed here.
check_venv() {
  local version wanted remedy="remove it ('rm -r $VENV') and run this again"
  version=$(python_version "$VENV_PYTHON")
  [ -n "$version" ] ||
    fail "$PWD/$VENV is broken: its Python does not run (was Python removed or the folder copied?); $remedy."
  at_least "$version" 3 11 ||
    fail "$PWD/$VENV has Python $version, but mpdit_jax needs 3.11 or newer; $remedy."
  if [ -n "${PYTHON:-}" ]; then
    wanted=$(python_version "$PYTHON")
    [ "$version" = "$wanted" ] ||
      fail "$PWD/$VENV has Python $version, but PYTHON=$PYTHON is ${wanted:-not a Python that runs}; $remedy, or unset PYTHON."
  fi
  "$VENV_PYTHON" -c 'import pip' 2>/dev/null ||
    fail "$PWD/$VENV has no pip; add it with '$VENV_PYTHON -m ensurepip', or $remedy."
}

# The first lines of the stamp: files that decide what is installed, and the folder that is installed in place.
installation_key() {
  cksum requirements.txt setup.py
  printf 'folder %s\n' "$PWD"
}

# install EXTRAS: a comma-separated list, possibly empty.
install() {
  local extras=$1 started=$SECONDS
  printf 'Installing mpdit_jax%s and its libraries into %s (1 to 2 GB, a minute or more) ...\n' \
    "${extras:+[$extras]}" "$VENV"
  rm -f "$STAMP"
  # Into a file, not -qq: its warnings tell a network out of reach from a version that does not exist.
  if ! "$VENV_PYTHON" -m pip install -q --disable-pip-version-check -r requirements.txt \
    -e ".${extras:+[$extras]}" >"$PIP_LOG" 2>&1; then
    if grep -qiE 'connection broken|NewConnectionError|NameResolutionError|name resolution|timed out|unreachable' "$PIP_LOG"; then
      fail "the libraries could not be downloaded, since the package index is out of reach; connect to the network" \
        "(or set PIP_INDEX_URL or PIP_FIND_LINKS to a place that can be reached) and run this again."
    fi
    grep -v '^WARNING' "$PIP_LOG" | tail -n 15 >&2 || true
    fail "pip could not install the libraries and says why above (all of it is in $PIP_LOG);" \
      "running this again starts the installation over."
  fi
  { installation_key && printf 'extras %s\n' "$extras"; } >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"
  rm -f "$UNFINISHED"
  printf 'Installed in %d s.\n' "$((SECONDS - started))"
}

prepare_environment() {
  local installed='' extras extra missing=''
  # Nobody has used an environment whose first installation broke off, so a clean start costs nothing but time.
  if [ -e "$UNFINISHED" ]; then
    printf '%s was left half-made by an earlier run; starting it over.\n' "$VENV"
    rm -rf "$VENV"
  fi
  if [ -e "$VENV" ]; then check_venv; else make_venv; fi

  if [ -f "$STAMP" ]; then installed=$(sed -n 's/^extras //p' "$STAMP"); fi
  extras=$installed
  for extra in ${1//,/ }; do
    case ",$installed," in
      *",$extra,"*) ;;
      *) missing=yes extras="${extras:+$extras,}$extra" ;;
    esac
  done
  if [ -n "$missing" ] || [ ! -f "$STAMP" ] || [ "$(installation_key)" != "$(sed '$d' "$STAMP")" ]; then
    install "$extras"
  fi
}
