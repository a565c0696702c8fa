#!/usr/bin/env bash
# Every benchmark there is data for, one after the other, and one table at the end.
#
#     bash scripts/v1_5/eval/all.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

run_all "$@"
