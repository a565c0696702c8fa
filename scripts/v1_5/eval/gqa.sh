#!/usr/bin/env bash
# GQA, attributes and relations: exact-match accuracy on the balanced test-development split.
# Unpruned, as published: LLaVA-1.5-7B 61.9; LLaVA-NeXT-7B 62.5, 64.2; LLaVA-1.5-13B 63.2, 63.3; LLaVA-NeXT-13B 65.4.
#
#     bash scripts/v1_5/eval/gqa.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate gqa
