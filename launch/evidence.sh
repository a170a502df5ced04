#!/usr/bin/env bash
# The experiments of docs/results.md: does pretraining pay? CIFAR10 is a tar or folder of its images.
#   bash launch/evidence.sh cpu cifar10.tar.xz              all that is meant for a machine without GPU: hours
#   bash launch/evidence.sh gpu cifar10.tar.xz labels       one part; --help tells of the others
set -euo pipefail
case "${2:-}" in /* | -* | "") ;; *) set -- "$1" "$PWD/$2" "${@:3}" ;; esac # before the folder changes
cd "$(dirname "$0")/.."
bash launch/setup.sh
exec .venv/bin/python bench/evidence.py "$@"
