#!/bin/bash
# TwigVLM++, stage 1 (distillation): a twig with a pruning head for a finished LLaVA-1.5 model:
#   twig_K=2 twig_T=3 bash scripts/v1_5/train/train_twig++_stage1.sh
# Made for 8 GPUs with 40 GB or more; the model itself is not changed. Weights of the losses from
# the environment under their published names: D_ALPHG (0.1), A_GAMMA (1.0), D_TEMP (5), A_B (19, the layer whose
# attention is learned). Other settings: MODEL, DATA, IMAGES, OUTPUT, ZERO, LAUNCHER, REPORT_TO, BF16, LR, any flag
# of llava.train.train_twigvlm_plus behind the command. Fewer GPUs: raise --gradient_accumulation_steps so that the
# global batch stays 128. The learning rate, 1e-4, is that of the script and of the paper alike; the second beta of
# AdamW is 0.999 in the script, as here, and 0.98 in the paper (--adam_beta2 0.98). The two samples of the 665k
# mixture that the recipe of TwigVLM leaves out are left out here, too.
set -euo pipefail
CDPATH= cd -- "$(dirname "$0")/../../.."
source scripts/train_common.sh
K=${twig_K:-2} T=${twig_T:-3}
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json}
SKIP=()
[[ $DATA != *llava_v1_5_mix665k.json ]] || SKIP=(--skip_samples 245723 247644)
LAYER=()
[ -z "${A_B:-}" ] || LAYER=(--attention_layer "$A_B")

start deepspeed.launcher.runner llava/train/train_twigvlm_plus.py \
    --stage 1 \
    --deepspeed "${ZERO:-./scripts/zero2.json}" \
    "${TRAINER_FLAGS[@]}" \
    --model_name_or_path "${MODEL:-liuhaotian/llava-v1.5-7b}" \
    --version v1 \
    --twig_K "$K" \
    --twig_T "$T" \
    --alpha "${D_ALPHG:-0.1}" \
    --gamma "${A_GAMMA:-1.0}" \
    --temperature "${D_TEMP:-5}" \
    ${LAYER[@]+"${LAYER[@]}"} \
    --data_path "$DATA" \
    --image_folder "${IMAGES:-./playground/data}" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate "${LR:-1e-4}" \
    --output_dir "${OUTPUT:-./checkpoints/TwigVLM++-stage1-llava1.5-7b-K$K-T$T}" \
    --save_steps 1000 \
    --gradient_checkpointing False \
    ${SKIP[@]+"${SKIP[@]}"} \
    "$@"
