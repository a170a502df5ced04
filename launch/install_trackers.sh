#!/usr/bin/env bash
# Install Weights & Biases and MLflow into .venv, the versions that are tested, for run.trackers and its tests. Does
# nothing if they are already installed. MLflow comes without its server: `pip install mlflow` elsewhere has `mlflow ui`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
python=.venv/bin/python
if "$python" -c 'import mlflow, sqlalchemy, wandb' 2>/dev/null; then exit 0; fi
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null # uv creates venvs without pip
"$python" -m pip install --quiet --disable-pip-version-check wandb==0.31.0 mlflow-skinny==3.17.2 sqlalchemy==2.1.9 \
    alembic==1.20.1 -c launch/requirements.txt
