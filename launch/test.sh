#!/usr/bin/env bash
# Set up, lint, and run the test suite. Arguments go to pytest; --all adds the slow tests, and demands MinkowskiEngine.
#   bash launch/test.sh                      the suite
#   bash launch/test.sh --all                every test
#   bash launch/test.sh tests/models -x      some of it
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
select="not slow"
if ! .venv/bin/python -c 'import models.sparse.minkowski' 2>/dev/null; then
    select="not slow and not minkowski"
    trap 'echo "NOT RUN: the tests of --model.backend minkowski; \`bash launch/install_minkowski.sh\` installs what they need"' EXIT
fi
args=()
for arg in "$@"; do
    if [ "$arg" = --all ]; then
        select=""
        bash launch/install_minkowski.sh
        trap - EXIT
    else
        args+=("$arg")
    fi
done
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -m "$select" ${args[@]+"${args[@]}"}
