#!/usr/bin/env bash
# Set up, lint, and run the test suite. Arguments go to pytest; --all adds the slow tests.
#   bash launch/test.sh                      the suite
#   bash launch/test.sh --all                every test
#   bash launch/test.sh tests/models -x      some of it
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
select=(-m "not slow")
args=()
for arg in "$@"; do
    if [ "$arg" = --all ]; then select=(); else args+=("$arg"); fi
done
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest ${select[@]+"${select[@]}"} ${args[@]+"${args[@]}"}
