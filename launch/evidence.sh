#!/usr/bin/env bash
# Run the experiments of docs/results.md. The second argument is a tar or folder of CIFAR-10 images.
#   bash launch/evidence.sh cpu cifar10.tar.xz              all experiments for a machine without GPU: takes hours
#   bash launch/evidence.sh gpu cifar10.tar.xz labels       one part; see --help for the others
set -euo pipefail
case "${2:-}" in /* | -* | "") ;; *) set -- "$1" "$PWD/$2" "${@:3}" ;; esac # make the path absolute before cd
cd "$(dirname "$0")/.."
bash launch/setup.sh
exec .venv/bin/python bench/evidence.py "$@"
