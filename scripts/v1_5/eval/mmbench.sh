#!/usr/bin/env bash
# MMBench, questions with options: accuracy on the development table, whose answers are public.
# For the server's own reading of the answers: scripts/convert_mmbench_for_submission.py.
#
#     bash scripts/v1_5/eval/mmbench.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

answer model_vqa_mmbench mmbench/mmbench_dev_20230712.tsv mmbench --single-pred-prompt
score mmbench
