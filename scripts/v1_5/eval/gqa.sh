#!/usr/bin/env bash
# GQA, attributes and relations: exact-match accuracy on the balanced test-development split.
#
#     bash scripts/v1_5/eval/gqa.sh [TOKENS] [KEY=VALUE ...]   see scripts/eval_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../eval_common.sh"

evaluate gqa
