#!/usr/bin/env bash
# MMBench in Chinese: as mmbench.sh.
# Unpruned, as published: LLaVA-1.5-7B 58.1; LLaVA-NeXT-7B 57.3; LLaVA-1.5-13B 63.6; LLaVA-NeXT-13B 64.4.
#
#     bash scripts/v1_5/eval/mmbench_cn.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate mmbench_cn
