#!/usr/bin/env bash
# All CPU benchmarks of docs/performance.md, with all cores and with one; the results go to bench/results. About half an
# hour on two idle cores; needs MinkowskiEngine (bash launch/install_minkowski.sh). SHARDS and PHOTOS are folders that
# data/prepare.py wrote: images of ImageNet's size, and photographs of some 12 megapixels.
#   bash bench/cpu.sh SHARDS PHOTOS
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
for threads in "$(nproc)" 1; do
    rounds=$((threads > 1 ? 5 : 3))
    for model in tiny atto; do
        for precision in fp32 bf16; do
            step=(--model "convnextv2_$model" --threads "$threads" --precision "$precision" --rounds "$rounds")
            "$python" bench/step.py pretrain "${step[@]}" --peers masked compiled minkowski \
                --save "cpu-pretrain-$model-$precision-$threads"
            "$python" bench/step.py finetune "${step[@]}" --save "cpu-finetune-$model-$precision-$threads"
        done
    done
done
"$python" bench/encoder.py --model convnextv2_atto --sweep --picture docs/scaling.svg --save cpu-sweep-atto
"$python" bench/loader.py "$1" --split val --save loader
"$python" bench/loader.py "$2" --images 24 --save loader-12-megapixels
