#!/usr/bin/env bash
# MMBench, questions with options: accuracy on the development table, whose answers are public, and
# the spreadsheet for the server, which has its own reading of the answers.
#
#     bash scripts/v1_5/eval/mmbench.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate mmbench
