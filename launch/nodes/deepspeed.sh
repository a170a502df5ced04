#!/usr/bin/env bash
# Several machines with DeepSpeed's launcher: run this once, on the first of them.
#   bash launch/nodes/deepspeed.sh HOSTFILE pretrain/main.py --config configs/pretrain/photos.yaml
# HOSTFILE has a line a machine, like `gpu01 slots=8`. Needs ssh without password to each, this folder at the same path
# on all (a shared file system), and pdsh. Without ssh, run on every machine, R being its line in HOSTFILE from 0:
#   NODE_RANK=R MASTER_ADDR=gpu01 bash launch/nodes/deepspeed.sh HOSTFILE pretrain/main.py ...
set -euo pipefail
cd "$(dirname "$0")/../.."
hostfile=${1:?give the hostfile, then the script and its arguments}
shift
here=()
if [ -n "${NODE_RANK:-}" ]; then
    here=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?name the first machine}")
fi
PATH="$PWD/.venv/bin:$PATH" exec deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" \
    ${here[@]+"${here[@]}"} "$@"
