#!/usr/bin/env bash
# Install optional packages into .venv, unless it can import MODULES. What they need has the versions that are tested.
#   bash launch/extra.sh MODULES PACKAGE==VERSION ...
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
python=.venv/bin/python
if "$python" -c "import $1" 2>/dev/null; then exit 0; fi
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null # uv creates venvs without pip
"$python" -m pip install --quiet --disable-pip-version-check "${@:2}" -c launch/requirements.txt
