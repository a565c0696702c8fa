#!/bin/bash
# Stage 1: the projector learns to describe images; everything else is frozen.
# Made for 8 GPUs with 80 GB. Other settings: MODEL, DATA, IMAGES, VISION_TOWER, OUTPUT, ZERO, LAUNCHER,
# REPORT_TO, BF16 from the environment, any flag of llava.train.train behind the command.
# Fewer GPUs: raise --gradient_accumulation_steps so that the global batch stays 256.
set -euo pipefail
CDPATH= cd -- "$(dirname "$0")/../.."
source scripts/train_common.sh

start deepspeed.launcher.runner llava/train/"$PROGRAM" \
    --deepspeed "${ZERO:-./scripts/zero2.json}" \
    "${LLAVA_FLAGS[@]}" \
    --version plain \
    --data_path "${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}" \
    --image_folder "${IMAGES:-./playground/data/LLaVA-Pretrain/images}" \
    --tune_mm_mlp_adapter True \
    --per_device_train_batch_size 32 \
    --learning_rate 1e-3 \
    --save_steps 24000 \
    --output_dir "${OUTPUT:-./checkpoints/llava-v1.5-13b-pretrain}" \
    "$@"
