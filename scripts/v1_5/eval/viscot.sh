#!/usr/bin/env bash
# Visual-CoT, free-form questions on twelve sets of images: mean score by a judge.
#
#     bash scripts/v1_5/eval/viscot.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
#
# and, as in the release of GlimpsePrune,
#
#     bash scripts/v1_5/eval/viscot.sh NEW_MODULES_DIR [ADAPTER_DIR]
#
# From the environment, besides what scripts/eval_common.sh reads:
#   SETS              such as "gqa textvqa" (default: the twelve there is data for, without emotic)
#   BRIEF=1           ask for a single word or phrase
#   BASE_MODEL        the checkpoint, another name for CKPT
#   NUM_SAMPLES       about so many questions of each set, another name for LIMIT
#   MAX_REMAIN_RATIO, MIN_REMAIN_NUM   options of METHOD=glimpseprune
#   DO_GLIMPSE=1      choose tokens and compare them with the boxes, without answering
#   USE_REF=1         keep what the boxes cover
#   SAVE_MASKS=1      write what was kept of each image as a picture, one pixel per token
#   ATTN_IMPL         attention: sdpa, flash_attention_2 or eager
#   MEMORY_LOGGER=1   the most memory of a GPU per answer; the time (TIME_LOGGER) is always told
#   ADAPTER_MERGE     1: ADAPTER_DIR is merged into the model, which is what happens in any case
# What these say beside the answers is in A_info.json, how the kept tokens meet the boxes in the
# table at the end.
source "$(dirname "${BASH_SOURCE[0]}")/../../released_names.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

LABEL+=$RELEASED_LABEL
if [ -n "$ADAPTER" ]; then
    EXTRA+=" --model-base $MODEL"
    MODEL=$ADAPTER MODEL_NAME=$(basename "$ADAPTER")
fi
ALL_ANSWERS=()
for name in ${SETS:-$(list_benchmarks --sets viscot | grep -vx emotic)}; do
    answer "viscot_$name${BRIEF:+_brief}"
    ALL_ANSWERS+=("$ANSWERS")
    [ -n "${DO_GLIMPSE:-}" ] || score "viscot_$name${BRIEF:+_brief}"
done
"$PYTHON" -m llava.eval.mask_report --where-known "${ALL_ANSWERS[@]}"
[ -n "${DO_GLIMPSE:-}" ] || "$PYTHON" -m llava.eval.score_table "${SCORES[@]}"
