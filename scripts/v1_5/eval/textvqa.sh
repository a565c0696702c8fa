#!/usr/bin/env bash
# TextVQA, reading text in images: soft accuracy on the validation split.
# Unpruned, as published: LLaVA-1.5-7B 58.2; LLaVA-NeXT-7B 60.3, 61.3; LLaVA-1.5-13B 61.3.
#
#     bash scripts/v1_5/eval/textvqa.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate textvqa
