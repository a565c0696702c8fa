#!/usr/bin/env bash
# MM-Vet, open questions that need several skills: grades by a judge, and the file for its server.
# Unpruned, as published: LLaVA-1.5-7B 31.1, 31.3; LLaVA-NeXT-7B 40.0; LLaVA-1.5-13B 36.1; LLaVA-NeXT-13B 48.4.
#
#     bash scripts/v1_5/eval/mmvet.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate mmvet
