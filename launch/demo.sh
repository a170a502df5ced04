#!/usr/bin/env bash
# The whole pipeline on the built-in digits: shards -> FCMAE pretraining -> fine-tuning, from the pretrained weights and
# from scratch with the same budget. Writes runs/demo/summary.json and runs/demo/reconstruction.png.
# About three minutes on two cores. Run again, it goes on where it was, or starts anew if it had finished.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

if [ -e runs/demo/summary.json ]; then rm -rf runs/demo; fi
mkdir -p runs/demo
[ -e runs/demo/started ] || date +%s >runs/demo/started
step() { printf '\n\033[1m== %s\033[0m\n%s\n' "$1" "\$ ${*:2}"; "${@:2}"; }

step "1/4  images -> shards" python data/prepare.py digits shards/digits
step "2/4  FCMAE pretraining" deepspeed --quiet pretrain/main.py --run.folder runs/demo --run.name pretrain
step "3/4  fine-tuning from the pretrained weights" \
    python finetune/main.py --init runs/demo/pretrain/fcmae.pt --run.folder runs/demo --run.name finetune
step "4/4  the same fine-tuning from scratch" \
    python finetune/main.py --init none --run.folder runs/demo --run.name scratch
step "result" python launch/demo_summary.py runs/demo
