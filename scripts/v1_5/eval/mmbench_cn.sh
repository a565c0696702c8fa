#!/usr/bin/env bash
# MMBench in Chinese: as mmbench.sh.
#
#     bash scripts/v1_5/eval/mmbench_cn.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate mmbench_cn
