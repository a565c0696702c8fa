#!/bin/bash
# A twig (TwigVLM) for a finished LLaVA-1.5 model: twig_K=2 twig_T=3 bash scripts/v1_5/train_twig.sh
# Made for 8 GPUs with 40 GB or more (4 are enough); the model itself is not changed. Other settings: MODEL,
# DATA, IMAGES, OUTPUT, ZERO, LAUNCHER, REPORT_TO, BF16 from the environment, any flag of llava.train.train_twigvlm
# behind the command. Fewer GPUs: raise --gradient_accumulation_steps so that the global batch stays 128.
# The two samples of the 665k mixture that the published recipe leaves out are left out here, too.
set -euo pipefail
CDPATH= cd -- "$(dirname "$0")/../.."
source scripts/train_common.sh
K=${twig_K:-2} T=${twig_T:-3}
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json}
SKIP=()
[[ $DATA != *llava_v1_5_mix665k.json ]] || SKIP=(--skip_samples 245723 247644)

start deepspeed.launcher.runner llava/train/train_twigvlm.py \
    --deepspeed "${ZERO:-./scripts/zero2.json}" \
    "${TRAINER_FLAGS[@]}" \
    --model_name_or_path "${MODEL:-liuhaotian/llava-v1.5-7b}" \
    --version v1 \
    --twig_K "$K" \
    --twig_T "$T" \
    --data_path "$DATA" \
    --image_folder "${IMAGES:-./playground/data}" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-4 \
    --output_dir "${OUTPUT:-./checkpoints/TwigVLM-llava1.5-7b-K$K-T$T}" \
    --save_steps 1000 \
    --gradient_checkpointing False \
    ${SKIP[@]+"${SKIP[@]}"} \
    "$@"
