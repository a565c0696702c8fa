#!/usr/bin/env bash
# POPE, objects that are or are not there: mean F1 of the three categories.
# Unpruned, as published: LLaVA-1.5-7B 85.9; LLaVA-NeXT-7B 86.5, 86.8; LLaVA-1.5-13B 85.9; LLaVA-NeXT-13B 86.2.
#
#     bash scripts/v1_5/eval/pope.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate pope
