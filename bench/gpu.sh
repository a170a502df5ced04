#!/usr/bin/env bash
# All GPU benchmarks of docs/performance.md on one NVIDIA GPU: the kernels' tests first, then timings. The results go to
# bench/results. About twenty minutes. PYTHON is the interpreter (default .venv/bin/python); MODELS, BATCH: a selection.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())')
read -ra models <<<"${MODELS:-atto tiny base large huge}"
declare -A batch=([atto]=1024 [tiny]=512 [base]=256 [large]=128 [huge]=64)

"$python" -m pytest -q tests/models/kernels tests/models/test_layouts.py
"$python" bench/kernels.py --batch 256 --save "$name-kernels"
for model in "${models[@]}"; do
    b=${BATCH:-${batch[$model]}}
    gpu=(--model "convnextv2_$model" --batch "$b" --device cuda --precision bf16)
    "$python" bench/encoder.py "${gpu[@]}" --peers masked compiled --save "$name-encoder-$model"
    "$python" bench/step.py pretrain "${gpu[@]}" --save "$name-step-pretrain-$model"
    for recompute in mlp block; do
        "$python" bench/step.py pretrain "${gpu[@]}" --peers masked --recompute "$recompute" \
            --save "$name-step-pretrain-$model-$recompute"
    done
done
for model in tiny base; do
    "$python" bench/step.py finetune --model "convnextv2_$model" --batch "${BATCH:-256}" --device cuda --precision bf16 \
        --save "$name-step-finetune-$model"
done
"$python" bench/encoder.py --model convnextv2_tiny --batch "${BATCH:-128}" --device cuda --precision bf16 --sweep \
    --picture "docs/scaling-$name.svg" --save "$name-sweep-tiny"
