#!/usr/bin/env bash
# Several machines with torchrun: run this on every one of them, with the same NODES and MASTER_ADDR.
#   NODES=4 NODE_RANK=0 MASTER_ADDR=gpu01 bash launch/nodes/torchrun.sh pretrain/main.py --config configs/pretrain/photos.yaml
# NODE_RANK counts the machines from 0. RANKS: processes on this machine (default: one a GPU).
set -euo pipefail
cd "$(dirname "$0")/../.."
exec .venv/bin/torchrun --nnodes "${NODES:?number of machines}" --node_rank "${NODE_RANK:?number of this machine, from 0}" \
    --nproc_per_node "${RANKS:-gpu}" --master_addr "${MASTER_ADDR:?name the first machine}" \
    --master_port "${MASTER_PORT:-29500}" "$@"
