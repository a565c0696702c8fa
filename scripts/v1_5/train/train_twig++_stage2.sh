#!/bin/bash
# TwigVLM++, stage 2 (reinforcement): the pruning head of the twig that stage 1 made learns which tokens answers need:
#   TWIG=./checkpoints/TwigVLM++-stage1-llava1.5-7b-K2-T3 bash scripts/v1_5/train/train_twig++_stage2.sh
# Made for 8 GPUs with 40 GB or more. Under their published names from the environment: NUM_GROUPS (32), POWER (2),
# A_B (the layer whose attention is held on to; as in stage 1). LR is the learning rate: 1e-4 in the published script,
# as here, 2e-5 in the paper. SAMPLES: 64000 in the script (500 steps of 128), 50000 in the paper. KL=0 leaves out the
# divergence from the model's attention, which the script has and the paper's formula has not. Other settings: MODEL,
# DATA, IMAGES, OUTPUT, ZERO, LAUNCHER, REPORT_TO, BF16, any flag of llava.train.train_twigvlm_plus behind the command.
# Fewer GPUs: raise --gradient_accumulation_steps so that the global batch stays 128. The two samples of the 665k
# mixture that the recipe of TwigVLM leaves out are left out here, too.
set -euo pipefail
CDPATH= cd -- "$(dirname "$0")/../../.."
source scripts/train_common.sh
TWIG=${TWIG:-./checkpoints/TwigVLM++-stage1-llava1.5-7b-K2-T3}
TWIG=${TWIG%/} NEXT=${TWIG%/}-stage2
[[ ${TWIG##*/} != *stage1* ]] || NEXT=${TWIG%stage1*}stage2${TWIG##*stage1}
DATA=${DATA:-./playground/data/llava_v1_5_mix665k.json}
SKIP=()
[[ $DATA != *llava_v1_5_mix665k.json ]] || SKIP=(--skip_samples 245723 247644)
LAYER=()
[ -z "${A_B:-}" ] || LAYER=(--attention_layer "$A_B")

start deepspeed.launcher.runner llava/train/train_twigvlm_plus.py \
    --stage 2 \
    --deepspeed "${ZERO:-./scripts/zero2.json}" \
    "${TRAINER_FLAGS[@]}" \
    --warmup_ratio 0.01 \
    --model_name_or_path "${MODEL:-liuhaotian/llava-v1.5-7b}" \
    --version v1 \
    --twig_path "$TWIG" \
    --num_samples "${SAMPLES:-64000}" \
    --num_groups "${NUM_GROUPS:-32}" \
    --power "${POWER:-2}" \
    --kl "${KL:-1}" \
    ${LAYER[@]+"${LAYER[@]}"} \
    --data_path "$DATA" \
    --image_folder "${IMAGES:-./playground/data}" \
    --image_aspect_ratio pad \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --learning_rate "${LR:-1e-4}" \
    --output_dir "${OUTPUT:-$NEXT}" \
    --save_steps 100 \
    --gradient_checkpointing False \
    ${SKIP[@]+"${SKIP[@]}"} \
    "$@"
