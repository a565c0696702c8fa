#!/bin/bash
# The glimpse of GlimpsePrune: 20,000 questions with boxes of Visual-CoT (GQA), Qwen2.5-VL frozen.
#
#     bash scripts/qwen2_5_vl/train_glimpse.sh [3b|7b] [flags of llava.train.train_glimpseprune]
#
# Other settings from the environment: MODEL, CONFIG, DATA, IMAGES, OUTPUT, LAUNCHER, REPORT_TO, BF16. Two GPUs, as in
# the paper (1250 steps; 24 GB each for 3B): LAUNCHER="accelerate launch --num_processes 2 -m".
set -euo pipefail
CDPATH= cd -- "$(dirname "$0")/../.."
size=3b
case "${1:-}" in
3b | 7b) size=$1 && shift ;;
'' | -*) ;;
*) echo "error: the size of the model is '$1', choose from 3b, 7b" >&2 && exit 1 ;;
esac
source scripts/train_common.sh

start "" llava.train.train_glimpseprune \
    --config "${CONFIG:-./scripts/qwen2_5_vl/train_glimpse_$size.yaml}" \
    --model_name_or_path "${MODEL:-Qwen/Qwen2.5-VL-$(tr a-z A-Z <<<"$size")-Instruct}" \
    --train_dataset "${DATA:-./scripts/v1_5/train_glimpse_data.yaml}" \
    --img_dir "${IMAGES:-./datas}" \
    --bf16 "$BF16" \
    --output_dir "${OUTPUT:-./checkpoints/qwen2.5-vl-$size-glimpse}" \
    --report_to "${REPORT_TO:-none}" \
    "$@"
