#!/bin/bash
# Stage 2 with LoRA: an adapter on the language model, and the projector.
# Made for 8 GPUs with 80 GB. Other settings: MODEL, DATA, IMAGES, VISION_TOWER, OUTPUT, ZERO, LAUNCHER,
# REPORT_TO, BF16 from the environment, any flag of llava.train.train behind the command.
# Fewer GPUs: raise --gradient_accumulation_steps so that the global batch stays 128.
set -euo pipefail
CDPATH= cd -- "$(dirname "$0")/../.."
source scripts/train_common.sh

start deepspeed.launcher.runner llava/train/"$PROGRAM" \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --deepspeed "${ZERO:-./scripts/zero3.json}" \
    "${LLAVA_FLAGS[@]}" \
    --version v1 \
    --data_path "${DATA:-./playground/data/llava_v1_5_mix665k.json}" \
    --image_folder "${IMAGES:-./playground/data}" \
    --pretrain_mm_mlp_adapter "${PROJECTOR:-./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin}" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --per_device_train_batch_size 16 \
    --learning_rate 2e-4 \
    --save_steps 50000 \
    --output_dir "${OUTPUT:-./checkpoints/llava-v1.5-13b-lora}" \
    "$@"
