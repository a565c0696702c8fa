#!/usr/bin/env bash
# MME, yes/no questions in pairs: the perception score (and cognition, where it is asked).
# Unpruned, as published: LLaVA-1.5-7B 1506, 1513; LLaVA-NeXT-7B 1511; LLaVA-1.5-13B 1531; LLaVA-NeXT-13B 1575.
#
#     bash scripts/v1_5/eval/mme.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate mme
