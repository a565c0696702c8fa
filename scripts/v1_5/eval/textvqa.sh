#!/usr/bin/env bash
# TextVQA, reading text in images: soft accuracy on the validation split.
#
#     bash scripts/v1_5/eval/textvqa.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate textvqa
