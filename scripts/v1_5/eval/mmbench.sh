#!/usr/bin/env bash
# MMBench, questions with options: accuracy on the development table, whose answers are public, and
# the spreadsheet for the server, which has its own reading of the answers.
# Unpruned, as published: LLaVA-1.5-7B 64.7; LLaVA-NeXT-7B 65.8, 67.9; LLaVA-1.5-13B 67.7; LLaVA-NeXT-13B 70.0.
#
#     bash scripts/v1_5/eval/mmbench.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate mmbench
