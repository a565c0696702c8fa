#!/usr/bin/env bash
# LLaVA-Bench in the wild, open questions: a judge compares the answers with those of GPT-4.
#
#     bash scripts/v1_5/eval/llavabench.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate llavabench
