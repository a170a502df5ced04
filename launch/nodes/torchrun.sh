#!/usr/bin/env bash
# Train on several machines with torchrun. Run this on every machine, with the same NODES and MASTER_ADDR:
#   NODES=4 NODE_RANK=0 MASTER_ADDR=gpu01 bash launch/nodes/torchrun.sh pretrain/main.py --config configs/pretrain/photos.yaml
# NODE_RANK counts the machines from 0. RANKS is the number of processes on this machine (default: one per GPU).
# With --restarts N, the run restarts up to N times on the machines that are left, and again when one comes back: run the
# same line there. NODES=2:4 waits for at least two. The others connect to machine 0, and wait ten minutes if it is lost.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${NODES:?set it to the number of machines}" "${NODE_RANK:?set it to the index of this machine, from 0}"
: "${MASTER_ADDR:?set it to the name of the first machine}" "${MASTER_PORT:=29500}"
if [[ " $* " == *" --restarts"[\ =]* ]]; then # the command becomes torchrun's agent: launch/restarts.py
    export MASTER_ADDR MASTER_PORT RANK="$NODE_RANK" LOCAL_RANK=0 LOCAL_SIZE="${RANKS:-gpu}"
    export CROSS_RANK="$NODE_RANK" CROSS_SIZE="$NODES"
    exec .venv/bin/python "$@"
fi
exec .venv/bin/torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "${RANKS:-gpu}" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
