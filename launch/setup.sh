#!/usr/bin/env bash
# Create .venv with the pinned versions of launch/requirements.txt. Does nothing if .venv is up to date.
# PYTHON sets the interpreter (default: python3; 3.10 or newer). Uses uv if it is installed, otherwise pip.
set -euo pipefail
cd "$(dirname "$0")/.."
mark=.venv/.requirements
if cmp -s launch/requirements.txt "$mark"; then exit 0; fi

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $python is older than Python 3.10: set a newer one, for example PYTHON=python3.12 bash $0" >&2
    exit 2
fi
echo "installing into .venv (torch with CUDA is several GB, so the first time takes some minutes)"
if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv
    uv pip install --quiet --python .venv/bin/python -r launch/requirements.txt
else
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        rm -rf .venv
        "$python" -m venv .venv || { rm -rf .venv; exit 2; }
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r launch/requirements.txt
fi
cp launch/requirements.txt "$mark"
