#!/usr/bin/env bash
# The experiments of docs/results.md. CIFAR10 is a tar or folder of its images.
#   bash launch/evidence.sh cpu cifar10.tar.xz              all experiments without a GPU; takes hours
#   bash launch/evidence.sh gpu cifar10.tar.xz labels       one part; see --help for the others
set -euo pipefail
case "${2:-}" in /* | -* | "") ;; *) set -- "$1" "$PWD/$2" "${@:3}" ;; esac # before the folder changes
cd "$(dirname "$0")/.."
bash launch/setup.sh
exec .venv/bin/python bench/evidence.py "$@"
