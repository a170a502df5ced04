#!/usr/bin/env bash
# Train on several machines with torchrun. Run this on every machine, with the same NODES and MASTER_ADDR:
#   NODES=4 NODE_RANK=0 MASTER_ADDR=gpu01 bash launch/nodes/torchrun.sh pretrain/main.py --config configs/pretrain/photos.yaml
# NODE_RANK counts the machines from 0. RANKS is the number of processes on this machine (default: one per GPU).
set -euo pipefail
cd "$(dirname "$0")/../.."
exec .venv/bin/torchrun \
    --nnodes "${NODES:?set it to the number of machines}" \
    --node_rank "${NODE_RANK:?set it to the index of this machine, from 0}" \
    --nproc_per_node "${RANKS:-gpu}" \
    --master_addr "${MASTER_ADDR:?set it to the name of the first machine}" \
    --master_port "${MASTER_PORT:-29500}" \
    "$@"
