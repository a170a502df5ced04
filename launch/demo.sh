#!/usr/bin/env bash
# Demo on the built-in digits: make shards, pretrain with FCMAE, then fine-tune from the pretrained weights and from
# scratch with the same budget, and segment digits. Writes runs/demo/summary.json and runs/demo/reconstruction.png.
# Takes three to five minutes on two cores. A rerun skips finished steps; delete runs/demo to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

if [ -e runs/demo/summary.json ]; then
    cat runs/demo/summary.json
    echo "done before: delete runs/demo to run the demo again"
    exit 0
fi
mkdir -p runs/demo
before=$(cat runs/demo/seconds 2>/dev/null || echo 0) # seconds of an interrupted run
SECONDS=0
trap 'echo $((before + SECONDS)) >runs/demo/seconds' EXIT
step() { printf '\n\033[1m== %s\033[0m\n%s\n' "$1" "\$ ${*:2}"; "${@:2}"; }

step "1/6  images -> shards" python data/prepare.py digits shards/digits --no-plan
step "2/6  FCMAE pretraining" \
    deepspeed --quiet --num_gpus 1 pretrain/main.py --run.folder runs/demo --run.name pretrain
step "3/6  fine-tuning from the pretrained weights" \
    python finetune/main.py --init runs/demo/pretrain/fcmae.pt --run.folder runs/demo --run.name finetune
step "4/6  the same fine-tuning from scratch" \
    python finetune/main.py --init none --run.folder runs/demo --run.name scratch
[ -e runs/demo/scenes/classes.txt ] || python launch/demo_scenes.py runs/demo/scenes
step "5/6  scenes and masks -> shards" python data/prepare.py runs/demo/scenes/images shards/scenes \
    --masks runs/demo/scenes/masks --mask-classes runs/demo/scenes/classes.txt --no-plan
step "6/6  segmentation from the pretrained weights" python finetune/main.py --config configs/finetune/scenes.yaml \
    --init runs/demo/pretrain/fcmae.pt --run.folder runs/demo --run.name segmentation
step "result" python launch/demo_summary.py runs/demo $((before + SECONDS))
