#!/usr/bin/env bash
# Train on several machines with DeepSpeed's launcher. Run this once, on the first machine:
#   bash launch/nodes/deepspeed.sh HOSTFILE pretrain/main.py --config configs/pretrain/photos.yaml
# HOSTFILE has one line per machine, such as `gpu01 slots=8`. Needs pdsh, passwordless ssh to all machines, and this
# folder at the same path on all of them (a shared file system). Without ssh, run this on every machine, where R is its
# line in HOSTFILE, counted from 0:
#   NODE_RANK=R MASTER_ADDR=gpu01 bash launch/nodes/deepspeed.sh HOSTFILE pretrain/main.py ...
# With --restarts N after the script, the run restarts up to N times on the machines that are left. The first
# machine must not be lost.
set -euo pipefail
cd "$(dirname "$0")/../.."
hostfile=${1:?pass the hostfile, then the script and its arguments}
shift
here=()
if [ -n "${NODE_RANK:-}" ]; then
    here=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?set it to the name of the first machine}")
fi
PATH="$PWD/.venv/bin:$PATH" exec deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" \
    ${here[@]+"${here[@]}"} "$@"
