#!/bin/bash
# Qwen2.5-VL learns from instructions: language model and merger; the tower too with
# --unfreeze_mm_vision_tower True.
# Made for 8 GPUs with 80 GB. Other settings: MODEL, DATA, IMAGES, OUTPUT, ZERO, LAUNCHER, REPORT_TO, BF16 from
# the environment, any flag of llava.train.train behind the command.
# Fewer GPUs: raise --gradient_accumulation_steps so that the global batch stays 128.
set -euo pipefail
CDPATH= cd -- "$(dirname "$0")/../.."
source scripts/train_common.sh

start deepspeed.launcher.runner llava/train/"$PROGRAM" \
    --deepspeed "${ZERO:-./scripts/zero3.json}" \
    "${QWEN_FLAGS[@]}" \
    --learning_rate 1e-5 \
    --save_steps 1000 \
    --output_dir "${OUTPUT:-./checkpoints/qwen2.5-vl-7b-finetuned}" \
    "$@"
