#!/usr/bin/env bash
# Visual-CoT, free-form questions on twelve sets of images: mean score by a judge.
# SETS="gqa textvqa" chooses; BRIEF=1 asks for a single word or phrase.
#
#     bash scripts/v1_5/eval/viscot.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

for name in ${SETS:-$(list_benchmarks --sets viscot)}; do
    evaluate "viscot_$name${BRIEF:+_brief}"
done
"$PYTHON" -m llava.eval.score_table "${SCORES[@]}"
