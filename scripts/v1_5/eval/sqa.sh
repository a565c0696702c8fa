#!/usr/bin/env bash
# ScienceQA, school science with options: accuracy on the questions that have an image.
#
#     bash scripts/v1_5/eval/sqa.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate sqa
