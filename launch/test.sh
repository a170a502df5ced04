#!/usr/bin/env bash
# Set up, lint, and run the test suite in two processes. Arguments go to pytest; --all adds the slow tests, and demands
# MinkowskiEngine and Chromium.
#   bash launch/test.sh                      the suite
#   bash launch/test.sh --all                every test: about 70 minutes on two cores
#   bash launch/test.sh --all --sample 1/3   of the slow ones about every third
#   bash launch/test.sh tests/models -x      some of it
#   bash launch/test.sh -n 8                 in eight processes
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
select="not slow"
missing=()
if ! .venv/bin/python -c 'import models.sparse.minkowski' 2>/dev/null; then
    select="$select and not minkowski"
    missing+=("NOT RUN: the tests of --model.backend minkowski; \`bash launch/install_minkowski.sh\` installs what they need")
fi
if ! command -v chromium >/dev/null; then
    select="$select and not browser"
    missing+=("NOT RUN: the tests of pages in a browser; \`apt-get install chromium\` installs what they need")
fi
trap 'for line in ${missing[@]+"${missing[@]}"}; do echo "$line"; done' EXIT
args=()
for arg in "$@"; do
    if [ "$arg" = --all ]; then
        select=""
        missing=()
        bash launch/install_minkowski.sh
    else
        args+=("$arg")
    fi
done
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -n 2 --dist loadgroup -m "$select" ${args[@]+"${args[@]}"}
