#!/usr/bin/env bash
# Visual-CoT, free-form questions on twelve sets of images: mean score by a judge.
#
#     bash scripts/v1_5/eval/viscot.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
#
# From the environment, besides what scripts/eval_common.sh reads:
#   SETS              such as "gqa textvqa" (default: the twelve there is data for, without emotic)
#   BRIEF=1           ask for a single word or phrase
#   DO_GLIMPSE=1      choose tokens and compare them with the boxes, without answering
#   USE_REF=1         keep what the boxes cover
#   MEMORY_LOGGER=1   the most memory of a GPU per answer; the time (TIME_LOGGER) is always told
# What these say beside the answers is in A_info.json, how the kept tokens meet the boxes in the
# table at the end.
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

ALL_ANSWERS=()
SETS=${SETS:-$(list_benchmarks --sets viscot | sed '/^emotic$/d')}
if [ -z "$SETS" ]; then
    echo "error: there is no data of Visual-CoT in ${DATA_DIR:-$DEFAULT_DATA}" >&2
    exit 1
fi
for name in $SETS; do
    answer "viscot_$name${BRIEF:+_brief}"
    ALL_ANSWERS+=("$ANSWERS")
    [ -n "${DO_GLIMPSE:-}" ] || score "viscot_$name${BRIEF:+_brief}"
done
"$PYTHON" -m llava.eval.mask_report --where-known "${ALL_ANSWERS[@]}"
[ ${#SCORES[@]} = 0 ] || "$PYTHON" -m llava.eval.score_table "${SCORES[@]}"
