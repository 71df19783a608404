#!/usr/bin/env bash
# The tests on the oldest dependencies (Python 3.11) and on the newest (Python 3.13): `make test-matrix`.
# PYTHON_OLDEST and PYTHON_NEWEST name the interpreters; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

run() { # name, interpreter, constraints, pytest arguments...
  local venv=".venv-$1" python=$2 constraints=$3
  shift 3
  "$python" -m venv --clear "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check -c "$constraints" hatchling editables
  "$venv/bin/pip" install -q --disable-pip-version-check -c "$constraints" -e '.[dev]'
  "$venv/bin/pip" list --disable-pip-version-check 2>/dev/null | grep -iE '^(torch|torchaudio|lightning|numpy|numba|jsonargparse|datasets|transformers) '
  "$venv/bin/python" -m pytest "$@"
}

oldest=$(mktemp) newest=$(mktemp)
trap 'rm -f "$oldest" "$newest"' EXIT
"${PYTHON_OLDEST:-python3.11}" tests/oldest.py >"$oldest"
run oldest "${PYTHON_OLDEST:-python3.11}" "$oldest" "$@"
run newest "${PYTHON_NEWEST:-python3.13}" "$newest" "$@"
