#!/usr/bin/env bash
# Set up, lint and run the tests in two processes. Arguments are passed to pytest. --all adds the slow tests; it installs
# Ray, MinkowskiEngine and the trackers, and requires Chromium.
#   bash launch/test.sh                      default suite
#   bash launch/test.sh --all                all tests
#   bash launch/test.sh --all --sample 1/3   default suite and about a third of the slow tests: sample 1 of 0, 1, 2
#   bash launch/test.sh tests/models -x      selected tests
#   bash launch/test.sh -n 8                 in eight processes
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
select="not slow"
missing=()
if ! .venv/bin/python -c 'import models.sparse.minkowski' 2>/dev/null; then
    select="$select and not minkowski"
    missing+=("NOT RUN: tests of --model.backend minkowski; to run them: bash launch/install_minkowski.sh")
fi
if ! command -v "${CXX:-c++}" >/dev/null; then
    missing+=("NOT RUN: tests of the C++ kernels; to run them: apt-get install g++")
fi
if ! command -v chromium >/dev/null; then
    select="$select and not browser"
    missing+=("NOT RUN: browser tests; to run them: apt-get install chromium")
fi
trap 'for line in ${missing[@]+"${missing[@]}"}; do echo "$line"; done' EXIT
args=()
for arg in "$@"; do
    if [ "$arg" = --all ]; then
        select=""
        missing=()
        bash launch/install_minkowski.sh
        bash launch/install_ray.sh
        bash launch/install_trackers.sh
    else
        args+=("$arg")
    fi
done
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -n 2 --dist loadgroup -m "$select" ${args[@]+"${args[@]}"}
