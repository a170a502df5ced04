#!/usr/bin/env bash
# Install Ray into .venv, the version that is tested, for --ray. Does nothing if it is already installed.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
python=.venv/bin/python
if "$python" -c 'import ray' 2>/dev/null; then exit 0; fi
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null # uv creates venvs without pip
"$python" -m pip install --quiet --disable-pip-version-check ray==2.60.0 -c launch/requirements.txt
