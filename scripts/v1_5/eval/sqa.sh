#!/usr/bin/env bash
# ScienceQA, school science with options: accuracy on the questions that have an image.
#
#     bash scripts/v1_5/eval/sqa.sh [TOKENS] [KEY=VALUE ...]       see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

answer model_vqa_science scienceqa/llava_test_CQM-A.json scienceqa/images/test --single-pred-prompt
score sqa
