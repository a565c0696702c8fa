#!/bin/bash
# Stage 1: the projector learns to describe images; everything else is frozen.
# Made for 8 GPUs with 80 GB. Other settings: MODEL, DATA, IMAGES, VISION_TOWER, OUTPUT, ZERO, LAUNCHER,
# REPORT_TO from the environment, any flag of llava.train.train behind the command.
# Fewer GPUs: raise --gradient_accumulation_steps so that the global batch stays 256.
set -euo pipefail
cd "$(dirname "$0")/../.."

${LAUNCHER:-deepspeed} llava/train/${PROGRAM:-train_mem.py} \
    --deepspeed "${ZERO:-./scripts/zero2.json}" \
    --model_name_or_path "${MODEL:-lmsys/vicuna-13b-v1.5}" \
    --version plain \
    --data_path "${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}" \
    --image_folder "${IMAGES:-./playground/data/LLaVA-Pretrain/images}" \
    --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --tune_mm_mlp_adapter True \
    --per_device_train_batch_size 32 \
    --learning_rate 1e-3 \
    --save_steps 24000 \
    --output_dir "${OUTPUT:-./checkpoints/llava-v1.5-13b-pretrain}" \
    --bf16 True \
    --num_train_epochs 1 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_total_limit 1 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to "${REPORT_TO:-wandb}" \
    "$@"
