#!/usr/bin/env bash
# All CPU benchmarks of docs/performance.md, with all cores and with one; the results go to bench/results. Some 25 minutes
# on two idle cores; needs MinkowskiEngine (bash launch/install_minkowski.sh). SHARDS and PHOTOS are folders that
# data/prepare.py wrote: images of ImageNet's size, and photographs of some 12 megapixels.
#   bash bench/cpu.sh SHARDS PHOTOS
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
"$python" bench/loader.py "$1" --split val --save cpu-loader
"$python" bench/loader.py "$2" --images 24 --rounds 3 --save cpu-loader-12-megapixels
for setting in "$(nproc) bf16" "$(nproc) fp32" "1 fp32"; do
    read -r threads precision <<<"$setting"
    for model in tiny atto; do
        step=(--model "convnextv2_$model" --threads "$threads" --precision "$precision" --gradients --rounds 5)
        name=$model-$precision-$threads
        "$python" bench/step.py pretrain "${step[@]}" --peers masked compiled minkowski --save "cpu-pretrain-$name"
        "$python" bench/step.py finetune "${step[@]}" --save "cpu-finetune-$name"
    done
    for task in segmentation detection; do
        "$python" bench/dense_step.py "$task" --model convnextv2_atto --batch 4 --size 256 --threads "$threads" \
            --precision "$precision" --rounds 5 --save "cpu-$task-atto-$precision-$threads"
    done
done
"$python" bench/encoder.py --model convnextv2_atto --sweep --rounds 3 --picture docs/scaling.svg --save cpu-sweep-atto
