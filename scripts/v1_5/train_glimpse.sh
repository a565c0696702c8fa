#!/bin/bash
# The glimpse of GlimpsePrune: 20,000 questions with boxes of Visual-CoT (GQA), LLaVA-1.5-7B frozen.
# Made for one GPU with 80 GB. Other settings: MODEL, DATA, IMAGES, OUTPUT, LAUNCHER, REPORT_TO, BF16 from the
# environment, any flag of llava.train.train_glimpseprune behind the command. Several GPUs:
# LAUNCHER="accelerate launch --num_processes 2 -m" (the paper: 2 GPUs, 1250 steps).
set -euo pipefail
CDPATH= cd -- "$(dirname "$0")/../.."
source scripts/train_common.sh

start "" llava.train.train_glimpseprune \
    --config "${CONFIG:-./scripts/v1_5/train_glimpse.yaml}" \
    --model_name_or_path "${MODEL:-liuhaotian/llava-v1.5-7b}" \
    --train_dataset "${DATA:-./scripts/v1_5/train_glimpse_data.yaml}" \
    --img_dir "${IMAGES:-./datas}" \
    --bf16 "$BF16" \
    --report_to "${REPORT_TO:-none}" \
    --output_dir "${OUTPUT:-./checkpoints/llava-v1.5-7b-glimpse}" \
    "$@"
