#!/usr/bin/env bash
# Install Weights & Biases and MLflow into .venv, the versions that are tested, for run.trackers and its tests. Does
# nothing if they are already installed. MLflow comes without its server: `pip install mlflow` elsewhere has `mlflow ui`.
set -euo pipefail
exec bash "$(dirname "$0")/extra.sh" "mlflow, sqlalchemy, wandb" \
    wandb==0.31.0 mlflow-skinny==3.17.2 sqlalchemy==2.1.9 alembic==1.20.1
