#!/usr/bin/env bash
# Install Ray into .venv, the version that is tested, for --ray. Does nothing if it is already installed.
set -euo pipefail
exec bash "$(dirname "$0")/extra.sh" ray ray==2.60.0
