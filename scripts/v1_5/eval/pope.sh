#!/usr/bin/env bash
# POPE, objects that are or are not there: mean F1 of the three categories.
#
#     bash scripts/v1_5/eval/pope.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate pope
