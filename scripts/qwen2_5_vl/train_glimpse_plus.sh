#!/bin/bash
# GlimpsePrune+ for Qwen2.5-VL-7B: the model learns to answer from pruned images (stage 1, an adapter), then a glimpse is
# trained for the model with that adapter (stage 2).
#
#     CUDA_VISIBLE_DEVICES=4,5 bash scripts/qwen2_5_vl/judge.sh &              # on GPUs of its own, for stage 1
#     bash scripts/qwen2_5_vl/train_glimpse_plus.sh [1|2] [flags of that stage's program]
#
# Without a number both stages run. The paper: 4 GPUs with 80 GB, and 48 GB for the judge, about a day. Other settings from
# the environment: MODEL, CONFIG, DATA, IMAGES, ADAPTER (what stage 1 writes), OUTPUT (stage 2), LAUNCHER, REPORT_TO, BF16,
# OPENAI_BASE_URL and JUDGE_MODEL (the judge). Fewer GPUs: with one, LAUNCHER="python -m" and
# --per_device_train_batch_size 4; the answers to one question must be drawn at once.
set -euo pipefail
CDPATH= cd -- "$(dirname "$0")/../.."
stages="1 2"
case "${1:-}" in
1 | 2) stages=$1 && shift ;;
'' | -*) ;;
*) echo "error: the stage is '$1', choose from 1, 2; without a number both run" >&2 && exit 1 ;;
esac
source scripts/train_common.sh
MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}
[[ $stages == 2 || ${ADAPTER:-/} == /* || $OLDPWD == "$PWD" ]] || ADAPTER=$OLDPWD/$ADAPTER # is written
ADAPTER=${ADAPTER:-./checkpoints/qwen2.5-vl-7b-glimpse-plus-lora}

if [[ $stages == *1* ]]; then
    # No GPU is loaded for a judge that does not answer.
    if [ -n "${CHECK:-}" ]; then
        $CHECK --requests 1
    else
        "$PYTHON" -m llava.train.reinforcement.judge_load --requests 1
    fi
    start "accelerate.commands.launch --num_processes 4 -m" llava.train.train_glimpseprune_plus \
        --config "${CONFIG:-./scripts/qwen2_5_vl/train_glimpse_plus.yaml}" \
        --model_name_or_path "$MODEL" \
        --train_dataset "${DATA:-./scripts/qwen2_5_vl/viscot_rand.yaml}" \
        --img_dir "${IMAGES:-./datas}" \
        --bf16 "$BF16" \
        --output_dir "$ADAPTER" \
        --report_to "${REPORT_TO:-none}" \
        "$@"
fi
if [[ $stages == *2* ]]; then
    [[ $stages == 2 ]] || set -- # the flags were those of stage 1
    start "accelerate.commands.launch --num_processes 2 -m" llava.train.train_glimpseprune \
        --config "${CONFIG_2:-./scripts/qwen2_5_vl/train_glimpse_7b.yaml}" \
        --model_name_or_path "$MODEL" \
        --adapter_dir "$ADAPTER" \
        --train_dataset "${DATA_2:-./scripts/v1_5/train_glimpse_data.yaml}" \
        --img_dir "${IMAGES:-./datas}" \
        --bf16 "$BF16" \
        --output_dir "${OUTPUT:-./checkpoints/qwen2.5-vl-7b-glimpse-plus}" \
        --report_to "${REPORT_TO:-none}" \
        "$@"
fi
